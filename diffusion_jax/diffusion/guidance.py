"""How conditional and unconditional predictions combine into the one that a sampler follows."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.types import Conditioning, Predict

# (x [b ...], t [b], conditioning) -> model output
Apply = Callable[[Array, Array, Conditioning], Array]


def identity(apply: Apply, conditioning: Conditioning) -> Predict:
    """Bind the conditioning and guide nothing: predict(x, t) = apply(x, t, conditioning)."""
    return lambda x, t: apply(x, t, conditioning)


def cfg(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: float | Float[Array, ""] | Float[Array, "b"],
) -> Predict:
    """Guide without a classifier: out = u + scale (c - u), one call with twice the batch.

    conditioning, unconditional: arrays with the leading axis b, under the same names. The doubled
      batch is [unconditional, conditional].
    scale: a number, or one for each sample; it may be traced. 1 is the conditional prediction
      (cheaper by `identity`), 0 the unconditional one.

    Raises ValueError when the two conditionings differ in their names or shapes.
    Source: Ho and Salimans 2022, equation 6, with scale = 1 + w.
    """
    if conditioning.keys() != unconditional.keys():
        raise ValueError(
            f"unconditional has {sorted(unconditional)}; it should have the conditioning's "
            f"{sorted(conditioning)}"
        )
    for name, value in conditioning.items():
        if value.shape != unconditional[name].shape:
            raise ValueError(
                f"unconditional[{name!r}] has the shape {unconditional[name].shape}; it should be "
                f"the conditioning's {value.shape}"
            )
    both = {
        name: jnp.concatenate([unconditional[name], value]) for name, value in conditioning.items()
    }

    def predict(x: Array, t: Array) -> Array:
        out = apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        out_u, out_c = jnp.split(out.astype(jnp.promote_types(out.dtype, jnp.float32)), 2)
        factor = jnp.asarray(scale, out_u.dtype)
        if factor.ndim:
            factor = factor.reshape(-1, *(1,) * (out_u.ndim - 1))
        return out_u + factor * (out_c - out_u)

    return predict
