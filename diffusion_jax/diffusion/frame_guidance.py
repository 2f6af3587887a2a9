"""Guidance of video: a scale for each frame of x [b t h w c].

Each guider takes what guidance.cfg takes; `scale` is the largest of its scales.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.guidance import Apply, cfg
from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.types import Conditioning, Predict

Scale = float | Float[Array, ""]
FrameScales = Float[Array, "t"]


def per_frame(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scales_of: Callable[[int], FrameScales],
) -> Predict:
    """Guide frame i of every clip with its own scale: out = u + scales[i] (c - u).

    scales_of: number of frames t -> scales [t], which may be traced.
    Raises ValueError as guidance.cfg does, and when x is not a video [b t h w c].
    """

    def predict(x: Array, t: Array) -> Array:
        if x.ndim != 5:
            raise ValueError(f"x has the shape {x.shape}; it should be a video, [b t h w c]")
        scales = jnp.broadcast_to(scales_of(x.shape[1]), x.shape[:2])
        return cfg(apply, conditioning, unconditional, scales)(x, t)

    return predict


def linear(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: Scale,
    *,
    min_scale: float = 1.0,
) -> Predict:
    """Guide with scales that grow evenly from min_scale (first frame) to scale (last), as SVD does.

    Raises ValueError as per_frame and linear_scales do. Source: sgm, LinearPredictionGuider.
    """
    return per_frame(
        apply, conditioning, unconditional, lambda frames: linear_scales(frames, min_scale, scale)
    )


def triangle(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: Scale,
    *,
    min_scale: float = 1.0,
    period: float | tuple[float, ...] = 1.0,
    period_fusing: Literal["mean", "multiply", "max"] = "max",
) -> Predict:
    """Guide with scales that rise from min_scale to scale and fall again, as SV3D does.

    period, period_fusing: see triangle_scales.
    Raises ValueError as per_frame and triangle_scales do. Source: sgm, TrianglePredictionGuider.
    """

    def scales_of(frames: int) -> FrameScales:
        return triangle_scales(frames, min_scale, scale, period, period_fusing)

    return per_frame(apply, conditioning, unconditional, scales_of)


def trapezoid(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: Scale,
    *,
    min_scale: float = 1.0,
    edge_perc: float = 0.1,
    plateau: Literal["one", "scale"] = "one",
) -> Predict:
    """Guide with scales that rise at the first frames, stay, and fall at the last ones.

    edge_perc, plateau: see trapezoid_scales.
    Raises ValueError as per_frame and trapezoid_scales do. Source: sgm, TrapezoidPredictionGuider.
    """

    def scales_of(frames: int) -> FrameScales:
        return trapezoid_scales(frames, min_scale, scale, edge_perc, plateau)

    return per_frame(apply, conditioning, unconditional, scales_of)


def spatiotemporal(
    apply: Apply,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: Scale,
    *,
    num_views: int = 1,
    min_scale: float = 1.0,
) -> Predict:
    """Guide t / num_views times of num_views views each: linear in time, triangle in view.

    Raises ValueError as per_frame and spatiotemporal_scales do.
    Source: sgm, SpatiotemporalPredictionGuider (SV4D).
    """

    def scales_of(frames: int) -> FrameScales:
        return spatiotemporal_scales(frames, min_scale, scale, num_views)

    return per_frame(apply, conditioning, unconditional, scales_of)


def linear_scales(num_frames: int, min_scale: Scale, max_scale: Scale) -> FrameScales:
    """Compute min + (max - min) i / (t - 1), float32 [t]; ValueError for num_frames below 1."""
    _check_frames(num_frames)
    return _between(min_scale, max_scale, np.linspace(0.0, 1.0, num_frames))


def triangle_scales(
    num_frames: int,
    min_scale: Scale,
    max_scale: Scale,
    period: float | tuple[float, ...] = 1.0,
    period_fusing: str = "max",
) -> FrameScales:
    """Compute min + (max - min) tri(v), v = linspace(0, 1, t), tri of value 0, 1, 0 in a period.

    period: in clips, so that 1 peaks once, in the middle; of several, the waves are fused.
    period_fusing: mean | multiply | max.
    Raises ValueError for num_frames below 1, a period that is not positive and unknown names.
    """
    _check_frames(num_frames)
    check_choice("period_fusing", period_fusing, tuple(_FUSINGS))
    periods = period if isinstance(period, tuple) else (period,)
    if not periods or not all(each > 0.0 for each in periods):
        raise ValueError(f"period = {period!r} should be one or more positive numbers")
    v = np.linspace(0.0, 1.0, num_frames)
    waves = np.stack([_triangle_wave(v / each) for each in periods])
    return _between(min_scale, max_scale, _FUSINGS[period_fusing](waves))


def trapezoid_scales(
    num_frames: int,
    min_scale: Scale,
    max_scale: Scale,
    edge_perc: float = 0.1,
    plateau: str = "one",
) -> FrameScales:
    """Compute a rise of int(t edge_perc) frames from min to max, a plateau, and the mirrored fall.

    edge_perc: the share of the frames in one edge, at most 1/2.
    plateau: "one" is upstream's: in the middle the scale is 1, no guidance; "scale" stays at max.
    Raises ValueError for num_frames below 1, edge_perc outside [0, 0.5] and unknown names.
    """
    _check_frames(num_frames)
    check_choice("plateau", plateau, ("one", "scale"))
    if not 0.0 <= edge_perc <= 0.5:
        raise ValueError(f"edge_perc = {edge_perc!r} should lie in [0, 0.5]")
    edge = int(num_frames * edge_perc)
    rise = _between(min_scale, max_scale, np.linspace(0.0, 1.0, edge))
    level = jnp.asarray(1.0 if plateau == "one" else max_scale, jnp.float32)
    return jnp.concatenate([rise, jnp.full(num_frames - 2 * edge, level), rise[::-1]])


def spatiotemporal_scales(
    num_frames: int, min_scale: Scale, max_scale: Scale, num_views: int = 1
) -> FrameScales:
    """Compute min + (max - min) (linear in time + triangle in view) / 2; views vary fastest.

    Raises ValueError unless num_views divides num_frames, both at least 1.
    """
    _check_frames(num_frames)
    if num_views < 1 or num_frames % num_views:
        raise ValueError(f"num_views = {num_views!r} should divide num_frames = {num_frames}")
    time = np.linspace(0.0, 1.0, num_frames // num_views)
    view = _triangle_wave(np.linspace(0.0, 1.0, num_views))
    return _between(min_scale, max_scale, (0.5 * (time[:, None] + view[None, :])).ravel())


def _triangle_wave(v: np.ndarray) -> np.ndarray:
    return 2.0 * np.abs(v - np.floor(v + 0.5))


_FUSINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda waves: waves.mean(0),
    "multiply": lambda waves: waves.prod(0),
    "max": lambda waves: waves.max(0),
}


def _between(low: Scale, high: Scale, share: np.ndarray) -> FrameScales:
    return low + (high - low) * jnp.asarray(share, jnp.float32)


def _check_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames = {num_frames!r} should be at least 1")
