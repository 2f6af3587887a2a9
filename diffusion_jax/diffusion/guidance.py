"""How conditional and unconditional predictions combine into the one that a sampler follows."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.types import Conditioning, Predict

# (x [b ...], level [b], conditioning) -> model output; the level is a timestep t or a sigma
Apply = Callable[[Array, Array, Conditioning], Array]

ScaleSchedule = Literal["constant", "linear", "cosine"]


def identity(apply: Apply, conditioning: Conditioning) -> Predict:
    """Bind the conditioning and guide nothing: predict(x, t) = apply(x, t, conditioning)."""
    return lambda x, t: apply(x, t, conditioning)


def cfg(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: float | Float[Array, ""] | Float[Array, "b"] | Float[Array, "b t"],
    *,
    interval: tuple[float, float] | None = None,
    scale_schedule: ScaleSchedule = "constant",
    rescale: float = 0.0,
    dynamic_percentile: float | None = None,
    norm_limit: float | None = None,
) -> Predict:
    """Guide without a classifier: out = u + scale (c - u), one call with twice the batch.

    conditioning, unconditional: arrays with the leading axis b, under the same names. The doubled
      batch is [unconditional, conditional].
    scale: a number, or one for each sample, or for each frame of each video; it may be traced. 1 is
      the conditional prediction (cheaper by `identity`), 0 the unconditional one.
    interval: (low, high) levels, as predict gets them (t, or sigma), in which the scale acts, both
      ends included; outside the scale is 1 (Kynkaanniemi et al. 2024), at the same cost.
    scale_schedule: how the scale grows from 1 at the interval's high end to `scale` at its low end:
      linear or cosine (half a period) in the level; constant is `scale` in all of it.
    rescale: how far the output is brought back to the standard deviation of c, which large scales
      inflate: 0 not at all, 1 fully (Lin et al. 2024, equations 15 and 16, phi); 0.7 there.
    dynamic_percentile: dynamic_threshold of the output, which must be a prediction of x_0.
    norm_limit: norm_threshold of the output, which must be a prediction of x_0.

    Raises ValueError when the two conditionings differ in their names or shapes, and for options
    out of range: low above high, a schedule without a finite interval, rescale outside [0, 1],
    dynamic_percentile outside (0, 1], norm_limit that is not positive.
    Source: Ho and Salimans 2022, equation 6, with scale = 1 + w.
    """
    _check_interval(interval, scale_schedule)
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale = {rescale!r} should lie in [0, 1]")
    if dynamic_percentile is not None and not 0.0 < dynamic_percentile <= 1.0:
        raise ValueError(f"dynamic_percentile = {dynamic_percentile!r} should lie in (0, 1]")
    check_norm_threshold("norm_limit", norm_limit)
    both = _double(conditioning, unconditional)

    def predict(x: Array, t: Array) -> Array:
        out = apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        out_u, out_c = jnp.split(out.astype(jnp.promote_types(out.dtype, jnp.float32)), 2)
        factor = _factor(jnp.asarray(scale, out_u.dtype), t, interval, scale_schedule)
        factor = _beside(factor, out_u)
        guided = out_u + factor * (out_c - out_u)
        if rescale > 0.0:
            guided = rescale_std(guided, out_c, rescale)
        if dynamic_percentile is not None:
            guided = dynamic_threshold(guided, dynamic_percentile)
        if norm_limit is not None:
            guided = norm_threshold(guided, norm_limit)
        return guided

    return predict


def instruct_pix2pix(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: float | Float[Array, ""] | Float[Array, "b"],
    *,
    image_only: Conditioning,
    image_scale: float | Float[Array, ""] | Float[Array, "b"] = 1.5,
) -> Predict:
    """Guide by an image and a text: out = u + image_scale (i - u) + scale (c - i), in one call.

    u sees neither of them (unconditional), i the image alone (image_only), c both (conditioning).
    Arguments otherwise as in `cfg`; with both scales 1 it is the conditional prediction.

    Raises ValueError when conditionings differ in their names or shapes.
    Source: Brooks et al. 2023, InstructPix2Pix, equation 3.
    """
    both = _double(conditioning, image_only)
    first = _double(image_only, unconditional)
    three = {
        name: jnp.concatenate([first[name][: len(value)], both[name]])
        for name, value in unconditional.items()
    }

    def predict(x: Array, t: Array) -> Array:
        out = apply(jnp.concatenate([x, x, x]), jnp.concatenate([t, t, t]), three)
        out_u, out_i, out_c = jnp.split(out.astype(jnp.promote_types(out.dtype, jnp.float32)), 3)
        of_image, of_text = (
            _beside(jnp.asarray(s, out_u.dtype), out_u) for s in (image_scale, scale)
        )
        return out_u + of_image * (out_i - out_u) + of_text * (out_c - out_i)

    return predict


def cfgpp(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: float | Float[Array, ""] | Float[Array, "b"],
) -> Predict:
    """Guide what is predicted and not the direction of a step (CFG++), with cfgpp_scales.

    A step of Euler's method or DDIM goes to x_0 + sigma_next eps. CFG++ takes x_0 from
    u + s (c - u), with s in [0, 1], and eps from u alone. In the coordinates x = x_0 + sigma eps
    that is the step of `cfg` with the scale s / (1 - sigma_next / sigma), another one in each step;
    this function is that `cfg`.
    Source: Chung et al. 2024, CFG++, algorithm 2.
    """
    return cfg(apply, conditioning, unconditional, scale)


def cfgpp_scales(scale: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Return the scale for `cfgpp` in each step: s / (1 - sigma_next / sigma), float32 [S].

    scale: s in [0, 1], one number or one for each step. ratios [S]: sigma_next / sigma, below 1.
    Raises ValueError for a scale outside of [0, 1].
    """
    if not np.all((scale >= 0.0) & (scale <= 1.0)):
        raise ValueError(f"guidance_scale = {scale} should be between 0 and 1 for cfgpp")
    return np.asarray(scale / (1.0 - ratios), np.float32)


def against(
    apply: Apply,
    conditioning: Conditioning,
    weaker: Predict,
    scale: float | Float[Array, ""] | Float[Array, "b"],
    *,
    interval: tuple[float, float] | None = None,
) -> Predict:
    """Guide away from a weaker model of the same distribution: out = w + scale (c - w).

    weaker: its prediction w, conditions bound. scale: 1 is no guidance. interval: as in `cfg`.
    Raises ValueError for an interval whose low end is above its high end.
    Source: Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself, equation 3.
    """
    _check_interval(interval, "constant")

    def predict(x: Array, t: Array) -> Array:
        both = (apply(x, t, conditioning), weaker(x, t))
        out, out_w = (y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in both)
        factor = _factor(jnp.asarray(scale, out.dtype), t, interval, "constant")
        return out_w + _beside(factor, out) * (out - out_w)

    return predict


def rescale_std(
    guided: Float[Array, "b *shape"], conditional: Float[Array, "b *shape"], phi: float
) -> Float[Array, "b *shape"]:
    """Rescale by phi std(conditional) / std(guided) + 1 - phi, each sample by its own.

    Source: Lin et al. 2024, Common Diffusion Noise Schedules and Sample Steps are Flawed, equations
    15 and 16.
    """
    axes = tuple(range(1, guided.ndim))
    # A fresh network may predict zero everywhere: 0 stays 0.
    std = jnp.maximum(guided.std(axes, keepdims=True), jnp.finfo(guided.dtype).tiny)
    ratio = conditional.std(axes, keepdims=True) / std
    return guided * (phi * ratio + 1.0 - phi)


def dynamic_threshold(
    x_start: Float[Array, "b *shape"], percentile: float
) -> Float[Array, "b *shape"]:
    """Clip x_0 to [-s, s] and divide by s, with s that quantile of |x_0| but at least 1.

    Each sample has its own s; percentile in (0, 1], 0.995 in Imagen. For pixels in [-1, 1].
    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """
    axes = tuple(range(1, x_start.ndim))
    s = jnp.quantile(jnp.abs(x_start), percentile, axis=axes, keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x_start, -s, s) / s


def norm_threshold(x_start: Float[Array, "b *shape"], limit: float) -> Float[Array, "b *shape"]:
    """Scale x_0 by limit / max(rms, limit), each sample by its own root mean square; for latents.

    Source: stablediffusion, norm_thresholding.
    """
    axes = tuple(range(1, x_start.ndim))
    rms = jnp.sqrt(jnp.mean(x_start**2, axes, keepdims=True))
    return x_start * (limit / jnp.maximum(rms, limit))


def check_norm_threshold(argument: str, limit: float | None) -> None:
    """Raise ValueError for a limit that is not positive; None is no threshold."""
    if limit is not None and not limit > 0.0:
        raise ValueError(f"{argument} = {limit!r} should be positive, or None for no threshold")


def _check_interval(interval: tuple[float, float] | None, scale_schedule: str) -> None:
    check_choice("scale_schedule", scale_schedule, tuple(_GROWTH))
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval = {interval!r} should be (low, high) with low <= high")
    if scale_schedule != "constant":
        if interval is None or not 0.0 < interval[1] - interval[0] < float("inf"):
            raise ValueError(
                f"scale_schedule = {scale_schedule!r} needs an interval of finite levels to grow "
                f"in, low < high; interval is {interval!r}"
            )


# progress through the interval, 0 at its high end -> how much of the guidance acts
_GROWTH: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - jnp.cos(jnp.pi * progress)),
}


def _factor(
    scale: Array, level: Array, interval: tuple[float, float] | None, scale_schedule: str
) -> Array:
    if interval is None:
        return scale
    low, high = interval
    level = level.astype(jnp.float32)
    inside = (level >= low) & (level <= high)
    growth = _GROWTH[scale_schedule](jnp.clip((high - level) / (high - low), 0.0, 1.0))
    return jnp.where(inside, 1.0 + (scale - 1.0) * growth, 1.0)


def _beside(factor: Array, out: Array) -> Array:
    """Give a factor of each sample, or of each frame, the axes of an output."""
    return factor.reshape(factor.shape + (1,) * (out.ndim - factor.ndim)) if factor.ndim else factor


def _double(conditioning: Conditioning, unconditional: Conditioning) -> dict[str, Array]:
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
    return {
        name: jnp.concatenate([unconditional[name], value]) for name, value in conditioning.items()
    }
