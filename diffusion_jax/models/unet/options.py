"""What the fields and inputs of a UNet must satisfy: each message names the field and its value."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.types import PyTree

CLASS_EMBEDDINGS = ("continuous", "timestep", "sequential")
# Layers that compute in the dtype of the input, float32, whatever the network's dtype is.
HEADS = ("out_2", "id_predictor_1", "final_layer_linear")


@dataclasses.dataclass(repr=False, eq=False)
class Fields(Dtypes):
    """What the UNets of images, of videos and of several views are made from; see UNet."""

    out_channels: int
    model_channels: int = 32
    channel_mult: Sequence[int] = (1, 2, 2)
    num_res_blocks: int | Sequence[int] = 4
    attention_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    conv_resample: bool = True
    num_classes: int | str | None = None
    adm_in_channels: int | None = None
    num_heads: int = 1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    transformer_depth: int | Sequence[int] = 1
    use_linear_in_transformer: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"
    remat: bool | str = False
    scan: bool = False


def per_level(options: Any, name: str) -> tuple[Any, ...]:
    """Read a field that holds one value, or one per level of channel_mult, as one per level.

    options: anything with the fields of UNet. Raises ValueError when the lengths differ.
    """
    value, levels = getattr(options, name), len(options.channel_mult)
    values = tuple(value) if isinstance(value, Sequence) else (value,) * levels
    if len(values) != levels:
        raise ValueError(
            f"{name} = {value!r} has {len(values)} entries; give {levels}, one per level of "
            f"channel_mult = {tuple(options.channel_mult)}"
        )
    return values


def half_kernels(params: PyTree) -> PyTree:
    """Round to bfloat16 the kernels that a network with this dtype rounds itself."""

    def rounded(path: Any, leaf: Array) -> Array:
        names = [key.key for key in path]
        half = names[-1] == "kernel" and not set(names) & set(HEADS)
        return leaf.astype(jnp.bfloat16) if half else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)


def check_options(options: Any) -> None:
    """Raise ValueError when fields of a UNet do not fit together."""
    if not options.channel_mult:
        raise ValueError("channel_mult is empty; give one factor per level, such as (1, 2, 4)")
    for name in ("out_channels", "model_channels", "patch_size", "time_cond_proj_dim"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} = {getattr(options, name)} should be at least 1")
    per_level(options, "num_res_blocks")
    per_level(options, "transformer_depth")
    for name in ("disable_self_attentions", "num_attention_blocks"):
        if getattr(options, name) is not None:
            per_level(options, name)
    _check_attention(options)
    _check_context_dim(options)
    _check_classes(options)


def _check_attention(options: Any) -> None:
    factors = tuple(2**level for level in range(len(options.channel_mult)))
    wanted = tuple(options.attention_resolutions)
    if wanted and not set(wanted) & set(factors):
        raise ValueError(
            f"attention_resolutions = {wanted} names no level; they are downsampling factors, and "
            f"the levels of this network have {factors}"
        )
    if wanted or not options.disable_middle_transformer:
        _check_heads(options, factors)


def _check_heads(options: Any, factors: tuple[int, ...]) -> None:
    name = "num_heads" if options.num_head_channels == -1 else "num_head_channels"
    value = getattr(options, name)
    if value < 1:
        raise ValueError(
            f"{name} = {value} should be at least 1; set num_heads or num_head_channels "
            "(-1 is for none)"
        )
    wide = [
        options.model_channels * mult
        for factor, mult in zip(factors, options.channel_mult, strict=True)
        if factor in options.attention_resolutions or factor == factors[-1]
    ]
    # A transformer may project to another width; an attention block cannot.
    loose = options.use_spatial_transformer and name == "num_head_channels"
    bad = [c for c in wide if c < value or (c % value and not loose)]
    if bad:
        raise ValueError(f"{name} = {value} does not divide the {bad[0]} channels of a level")


def _check_context_dim(options: Any) -> None:
    if options.context_dim is None:
        return
    if not options.use_spatial_transformer:
        raise ValueError(
            f"context_dim = {options.context_dim!r} needs use_spatial_transformer = True: "
            "attention blocks see no context"
        )
    if isinstance(options.context_dim, Sequence):
        depths, dims = set(per_level(options, "transformer_depth")), tuple(options.context_dim)
        if depths != {len(dims)} and len(set(dims)) != 1:
            raise ValueError(
                f"context_dim = {dims} has one width per transformer block, so transformer_depth = "
                f"{options.transformer_depth!r} should be {len(dims)}"
            )


def _check_classes(options: Any) -> None:
    kind = options.num_classes
    if isinstance(kind, str) and kind not in CLASS_EMBEDDINGS:
        raise ValueError(
            f"num_classes = {kind!r} is unknown; give the number of classes, None or one of "
            f"{', '.join(CLASS_EMBEDDINGS)}"
        )
    if isinstance(kind, int) and kind < 1:
        raise ValueError(f"num_classes = {kind} should be at least 1")
    if kind == "sequential" and options.adm_in_channels is None:
        raise ValueError('num_classes = "sequential" needs adm_in_channels, the width of y')


def check_inputs(options: Any, x: Array, context: Any, y: Array | None) -> None:
    """Raise ValueError when the shapes of x, context or y do not fit the fields of a UNet."""
    multiple = options.patch_size * 2 ** (len(options.channel_mult) - 1)
    if x.shape[1] % multiple or x.shape[2] % multiple:
        raise ValueError(
            f"x is {x.shape[1]} x {x.shape[2]} pixels; both should be multiples of {multiple} "
            f"(patch_size {options.patch_size} and {len(options.channel_mult)} levels)"
        )
    _check_context(options, context)
    if (y is None) != (options.num_classes is None):
        given = "is missing" if y is None else f"{y.shape} is given"
        raise ValueError(f"y {given} and num_classes = {options.num_classes!r}")
    if y is not None:
        wanted = (options.adm_in_channels,) if options.num_classes == "sequential" else ()
        if y.shape[1:] != wanted:
            raise ValueError(
                f"y has shape {y.shape}; num_classes = {options.num_classes!r} needs "
                f"{(x.shape[0], *wanted)}"
            )
        if isinstance(options.num_classes, int) and not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"y is {y.dtype}; labels should be integers")


def check_numbers(options: Any, guidance: Array | None, duration: Array | None) -> None:
    """Raise ValueError for a number beside t that a network does not read."""
    if guidance is not None and options.time_cond_proj_dim is None:
        raise ValueError("guidance is given and time_cond_proj_dim = None: the network reads none")
    if duration is not None and not options.embeds_duration:
        raise ValueError("duration is given and embeds_duration = False: the network reads none")


def _check_context(options: Any, context: Any) -> None:
    if (context is None) != (options.context_dim is None):
        given = "is missing" if context is None else "is given"
        raise ValueError(f"context {given} and context_dim = {options.context_dim!r}")
    if context is None:
        return
    contexts = tuple(context) if isinstance(context, Sequence) else (context,)
    dims = options.context_dim
    dims = tuple(dims) if isinstance(dims, Sequence) else (dims,) * len(contexts)
    if len(contexts) == 1 and len(set(dims)) > 1:
        raise ValueError(
            f"context is one array and context_dim = {dims} differ; give one array per block"
        )
    for i, (array, dim) in enumerate(zip(contexts, dims, strict=False)):
        if array.shape[-1] != dim:
            raise ValueError(f"context {i} has width {array.shape[-1]}; context_dim needs {dim}")


def check_clips(
    options: Any, x: Array, context: Array | None, y: Array | None, image_only_indicator: Any
) -> None:
    """Raise ValueError when shapes do not fit the fields of a UNet of videos, or one another.

    x [b t h w c], context [b n d] or [b t n d], y [b ...] or [b t ...], image_only_indicator [b t].
    """
    clips, frames = x.shape[:2]
    if context is not None and context.ndim == 4 and context.shape[1] != frames:
        raise ValueError(f"context is for {context.shape[1]} frames, and x has {frames}")
    if y is not None and is_per_frame(options, y):
        if y.shape[1] != frames:
            raise ValueError(f"y is for {y.shape[1]} frames, and x has {frames}")
        y = y[:, 0]
    if image_only_indicator is not None and image_only_indicator.shape != (clips, frames):
        raise ValueError(
            f"image_only_indicator has shape {image_only_indicator.shape}; it should have "
            f"{(clips, frames)}, a number for each frame of x"
        )
    check_inputs(options, x[:, 0], context, y)


def is_per_frame(options: Any, y: Array) -> bool:
    """Tell whether y describes each frame of a clip, [b t ...], or the clip, [b ...]."""
    return y.ndim == (3 if options.num_classes == "sequential" else 2)


def sides_of(kernel_size: int | Sequence[int], name: str = "video_kernel_size") -> tuple[int, ...]:
    """Give the sides (t, h, w) of a kernel over time; ValueError unless there are three odd ones.

    An even side would change the number of frames. name: of the field.
    """
    sides = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sides) != 3 or any(side < 1 or side % 2 == 0 for side in sides):
        raise ValueError(f"{name} = {kernel_size!r} should be an odd number, or three: (t, h, w)")
    return sides
