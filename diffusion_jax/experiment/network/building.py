"""The `model` and `conditioning` sections -> a network with its embedders."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind_section,
    check_range,
    check_type,
    parameters_of,
    pick,
    row,
)
from diffusion_jax.experiment.config.options import ConditioningOptions
from diffusion_jax.experiment.first_stage.frozen import build_first_stage
from diffusion_jax.experiment.network.frames import check_lengths
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.network.staged import with_channels
from diffusion_jax.experiment.network.text import tokenizers_of, with_null_tokens
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.embedders import EMBEDDERS
from diffusion_jax.models.conditioning.routing import CONDITIONING_KEYS
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet

MODEL = Section(
    "config.model",
    "The network that is trained.",
    table={
        "unet": UNet,
        "video_unet": VideoUNet,
        "multiview_unet": MultiviewUNet,
        "dit": DiT,
    },
    own=(),
)
CONDITIONING = Section(
    "config.conditioning",
    "What the network is conditioned on; by default on nothing.",
    ((ConditioningOptions, ()),),
)
EMBEDDER = Section(
    "config.conditioning.embedders.NAME",
    "One source of conditioning, under any name.",
    table=EMBEDDERS,
    own=(),
)


def build_network(
    model: Mapping[str, Any],
    conditioning: Mapping[str, Any] | None,
    data_shape: tuple[int, int, int],
    first_stage: Mapping[str, Any] | None = None,
    num_frames: int | None = None,
) -> Network:
    """Build the network of a config for images of data_shape, or clips of so many of them.

    Fields of the network that follow from the data and the embedders may be left out: see _derived.
    Raises ConfigError when an option is wrong, or differs from what follows.
    """
    (options,) = bind_section(CONDITIONING, conditioning).own
    options = ConditioningOptions(**options)
    pick(CONDITIONING_KEYS, options.key, f"{CONDITIONING.path}.key")
    for name in options.force_uc_zero:
        pick(options.embedders, name, f"{CONDITIONING.path}.force_uc_zero")
    embedders = {name: _embedder(name, options.embedders[name]) for name in _ordered(options)}
    stage = None if first_stage is None else build_first_stage(first_stage, data_shape)
    image_shape = data_shape if stage is None else stage.latent_shape
    embedders = with_channels(embedders, image_shape, num_frames)
    if num_frames is not None:
        check_lengths(embedders, num_frames)
    derived = _derived(options.key, embedders, image_shape, is_latent=stage is not None)
    return Network(
        _module(model, derived),
        embedders,
        options.key,
        image_shape,
        stage,
        tokenizers_of(embedders),
        options.force_uc_zero,
        num_frames,
        options.frame_noise,
        options.frame_fit,
        options.object_share,
        options.first_views,
    )


def _ordered(options: ConditioningOptions) -> Sequence[str]:
    """List the names of the embedders in the order of the config.

    An embedder that was taken out of a config may still stand in the order.
    """
    names = list(options.embedders)
    if not options.order:
        return names
    ordered = [name for name in options.order if name in names]
    if sorted(ordered) != sorted(names):
        raise ConfigError(
            f"{CONDITIONING.path}.order = {options.order!r} should name each embedder once: "
            f"{', '.join(names)}"
        )
    return ordered


def _embedder(name: str, section: Any) -> Embedder:
    path = f"config.conditioning.embedders.{name}"
    embedder = bind_section(EMBEDDER._replace(path=path), section).make()
    if not isinstance(embedder, Embedder):
        raise ConfigError(f"{path}.name = {section['name']!r} should return an Embedder")
    check_range(embedder.ucg_rate, f"{path}.ucg_rate", low=0.0, high=1.0)
    try:
        jnp.dtype(embedder.dtype)
    except TypeError as error:
        raise ConfigError(
            f"{path}.dtype = {embedder.dtype!r} should be a dtype such as float32 or int32"
        ) from error
    return with_null_tokens(embedder, path)


def _derived(
    key: str,
    embedders: Mapping[str, Embedder],
    image_shape: tuple[int, int, int],
    *,
    is_latent: bool,
) -> dict[str, tuple[Any, str]]:
    """Find what the data and the embedders say about the network: {field: (value, why)}."""
    images = "the latents" if is_latent else "the images (config.data.batches.channels)"
    derived: dict[str, tuple[Any, str]] = {
        "out_channels": (image_shape[-1], f"the channels of {images}")
    }
    shapes = conditioning_shapes(embedders, image_shape)
    given = {entry: shapes[entry] for entry in CONDITIONING_KEYS[key] if entry in shapes}
    if "crossattn" in given:
        width = given["crossattn"].shape[-1]
        derived["context_dim"] = (width, "the width of what the embedders give as context")
    if "vector" in given and len(given["vector"].shape) > 1:
        derived["num_classes"] = ("sequential", "as the embedders give vectors of features")
        width = given["vector"].shape[-1]
        derived["adm_in_channels"] = (width, "the width of the vectors that the embedders give")
    for name, embedder in embedders.items():
        if embedder.embeds_labels_in_network and embedder.num_classes is not None:
            why = f"the null class and the {embedder.num_classes} of {CONDITIONING.path}.embedders"
            derived["num_classes"] = (embedder.num_classes + 1, f"{why}.{name}")
    return derived


def _takes(annotation: Any, value: Any) -> bool:
    """Tell whether a field takes a value: num_classes of a module may be a number and no word."""
    try:
        check_type(value, annotation, MODEL.path)
    except ConfigError:
        return False
    return True


def _module(model: Mapping[str, Any], derived: Mapping[str, tuple[Any, str]]) -> nn.Module:
    fields = parameters_of(row(MODEL.table, model, MODEL.path, own=True))
    follows = {
        name: value
        for name, (value, _) in derived.items()
        if name in fields and _takes(fields[name].annotation, value)
    }
    bound = bind_section(MODEL, follows | dict(model))
    for name, value in follows.items():
        given = bound.keywords[name]
        widths = set(given) if isinstance(given, tuple) else {given}  # one for each block
        if widths != {value}:
            raise ConfigError(
                f"{MODEL.path}.{name} = {given!r} should be {value!r}, {derived[name][1]}; or "
                "leave it out"
            )
    return bound.make()
