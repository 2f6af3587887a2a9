"""Count the floating-point operations of a program from its jaxpr: matrix products, convolutions.

Everything else (norms, activations, softmax) is left out, as is usual for model FLOPs, because
memory limits it and not arithmetic. Nothing is compiled or computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

# cuDNN's attention, and its matrix products of b * n * queries * keys * head width multiply-adds.
ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Trace function(*args, **kwargs) and count its FLOPs, two per multiply-add, on all devices.

    args: arrays or jax.ShapeDtypeStruct. What remat computes again counts; trace the function
    without remat for the FLOPs of the model.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs))


def jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Count the FLOPs of a jaxpr, two per multiply-add.

    The body of a scan counts as often as it runs, the body of a while loop, whose length is not
    known, once, and a condition as its dearest branch. A shard_map counts on all devices that split
    its arguments, a Pallas kernel at every point of its grid.
    """
    return sum(_equation_flops(eqn) for eqn in _live(jaxpr))


def kernel_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Count the FLOPs of a jaxpr that are in Pallas kernels, which XLA cannot see."""
    total = 0
    for eqn in _live(jaxpr):
        name = eqn.primitive.name
        if name == "pallas_call":
            total += _equation_flops(eqn)
            continue
        inner = [kernel_flops(jaxpr) for jaxpr in _inner_jaxprs(eqn.params)]
        total += max(inner) if name == "cond" else _repeats(name, eqn.params) * sum(inner)
    return total


def _live(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[Any]:
    """Pass over equations that nothing comes of; JAX 0.10 leaves some in what remat does again."""
    return (eqn for eqn in jaxpr.eqns if eqn.outvars or eqn.effects)


def _equation_flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
        lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
        if name == "dot_general":
            return _dot_flops(lhs, rhs, params["dimension_numbers"])
        return _conv_flops(lhs, rhs, out, params)
    if name in ATTENTION:
        (_, keys, *_), q = eqn.invars[1].aval.shape, eqn.invars[0].aval.shape
        return 2 * ATTENTION[name] * math.prod(q) * keys
    inner = [jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return _repeats(name, params) * sum(inner)


def _repeats(name: str, params: dict[str, Any]) -> int:
    """Tell how often the jaxprs of an equation run."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        specs = jax.tree.leaves((params["in_specs"], params["out_specs"]), is_leaf=_is_spec)
        entries = {axis for spec in specs for entry in spec for axis in _axes(entry)}
        return math.prod(params["mesh"].shape[axis] for axis in entries)
    return 1


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, jax.sharding.PartitionSpec)


def _axes(entry: str | Sequence[str] | None) -> Sequence[str]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield leaf


def _dot_flops(lhs: Sequence[int], rhs: Sequence[int], dimensions: Any) -> int:
    (_, contracted), (_, batch) = dimensions
    free = (n for i, n in enumerate(rhs) if i not in (*contracted, *batch))
    return 2 * math.prod(lhs) * math.prod(free)


def _conv_flops(
    lhs: Sequence[int], rhs: Sequence[int], out: Sequence[int], params: dict[str, Any]
) -> int:
    """Count the products with elements of lhs, not with padding or the zeros of a dilation.

    So each gradient of a convolution costs as much as the convolution, whatever its stride.
    """
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    products = math.prod(
        taps(
            lhs[i],
            rhs[k],
            out[o],
            stride=stride,
            low=low,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
        )
        for i, k, o, stride, (low, _), lhs_dilation, rhs_dilation in zip(
            lhs_spec[2:],
            rhs_spec[2:],
            out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    # rhs has the input features of one group; the batch of out is divided by the batch groups.
    return 2 * products * out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]


def taps(
    lhs: int, rhs: int, out: int, *, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Count the pairs of an output and a kernel position that meet an element of lhs, on one axis.

    lhs, rhs, out: sizes of a convolution's axis. low: padding before the first element of lhs.
    """
    place = np.arange(out)[:, None] * stride + np.arange(rhs) * rhs_dilation - low
    inside = (place >= 0) & (place <= (lhs - 1) * lhs_dilation) & (place % lhs_dilation == 0)
    return int(inside.sum())
