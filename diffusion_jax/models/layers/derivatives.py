"""Functions with derivatives of their own, in forward and in reverse mode.

jax.custom_vjp gives up forward mode (jax.jvp), and with jax.custom_jvp JAX decides what a backward
pass keeps and computes. Here both rules are given: the tangent of a function is one primitive,
linear in the tangents of its arguments, and the transpose of this primitive is the other rule.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Arrays: TypeAlias = tuple[Array, ...]


class _Rules(NamedTuple):
    """(saved, *tangents) -> tangent of the result; (saved, its gradient) -> gradients."""

    tangent: Callable[..., Array]
    gradients: Callable[[Arrays, Array], Arrays]


def with_derivatives(
    forward: Callable[..., tuple[Array, Arrays]],
    tangent: Callable[..., Array],
    gradients: Callable[[Arrays, Array], Arrays],
) -> Callable[..., Array]:
    """Make the function (*arrays) -> forward(*arrays)[0], differentiated by the given rules.

    Derivatives of higher order, in any mix of modes, are what JAX finds for the rules themselves.

    Args:
        forward: (*arrays) -> (result, saved); saved is what the rules read.
        tangent: (saved, *tangents of the arrays) -> the tangent of the result.
        gradients: (saved, the gradient of the result) -> the gradients of the arrays; the transpose
            of tangent.
    """
    # Traced once for each shape, however many layers have it.
    forward = jax.jit(forward, inline=True)
    rules = _Rules(jax.jit(tangent, inline=True), jax.jit(gradients, inline=True))

    @jax.custom_jvp
    def function(*arrays: Array) -> Array:
        return forward(*arrays)[0]

    @function.defjvp
    def differentiate(arrays: Arrays, tangents: Arrays) -> tuple[Array, Array]:
        result, saved = forward(*arrays)
        params = {"rules": rules, "num_saved": len(saved), "aval": jax.typeof(result)}
        return result, _tangent_p.bind(*saved, *tangents, **params)

    return function


def then(*arrays: Array) -> Arrays:
    """Return the arrays, and on a GPU compute what is made of them after all of them are there.

    There two sums and what follows from them are so computed from the inputs twice, in two kernels
    that read half precision. XLA would compute what they share once, and keep it in float32.
    """
    after = lambda *arrays: lax.optimization_barrier(arrays)
    return lax.platform_dependent(*arrays, cuda=after, default=lambda *arrays: arrays)


_tangent_p = Primitive("tangent_with_own_transpose")


def _evaluate(*operands: Array, rules: _Rules, num_saved: int, aval: Any) -> Array:
    del aval
    return rules.tangent(operands[:num_saved], *operands[num_saved:])


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Array, Array]:
    """Differentiate the tangent once more; as long as what is saved stays, it is linear."""
    saved, moved = primals[: params["num_saved"]], tangents[: params["num_saved"]]
    whole = tuple(map(ad.instantiate_zeros, tangents))
    if all(isinstance(tangent, ad.Zero) for tangent in moved):
        primal = _tangent_p.bind(*primals, **params)
        return primal, _tangent_p.bind(*saved, *whole[len(saved) :], **params)
    return jax.jvp(partial(_evaluate, **params), tuple(primals), whole)


def _transpose(
    gradient: Any, *operands: Any, rules: _Rules, num_saved: int, aval: Any
) -> list[Array | None]:
    del aval
    found = rules.gradients(operands[:num_saved], ad.instantiate_zeros(gradient))
    wanted = map(ad.is_undefined_primal, operands[num_saved:])
    return [None] * num_saved + [g if want else None for g, want in zip(found, wanted, strict=True)]


def _batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Array, int]:
    return jax.vmap(partial(_evaluate, **params), in_axes=tuple(axes))(*operands), 0


_tangent_p.def_impl(_evaluate)
_tangent_p.def_abstract_eval(lambda *_, aval, **__: aval)
ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_evaluate, multiple_results=False))
