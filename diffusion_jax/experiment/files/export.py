"""A model of this program -> a file or folder that other programs load."""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights.claims import (
    EDM_LEVELS,
    METADATA_KEY,
    V_MARK,
    ZERO_SNR_MARK,
)
from diffusion_jax.convert.weights.diffusers_folder import (
    penultimate_text,
    save_diffusers,
    text_config,
    unet_config,
)
from diffusion_jax.convert.weights.diffusers_pipeline import model_card, tokenizer_files
from diffusion_jax.convert.weights.diffusers_video import (
    pixels_config,
    video_unet_config,
    vision_config,
)
from diffusion_jax.convert.weights.places import export_checkpoint
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.claims import is_zero_snr, prediction_of
from diffusion_jax.experiment.files.diffusers_scheduler import diffusers_scheduler
from diffusion_jax.experiment.first_stage.autoencoders import kind_of
from diffusion_jax.experiment.guiders import scale_in
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.embedders import ConcatTimestepEmbedder
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipImage, OpenClipText
from diffusion_jax.models.conditioning.video_embedders import EncodedFrames
from diffusion_jax.models.unet.video_unet import VideoUNet

# The text encoders of a network, in order, and the layout whose places are theirs.
LAYOUT_OF_TEXTS: dict[tuple[str, ...], str] = {
    ("clip",): "sd1",
    ("open_clip_legacy",): "sd2",
    ("clip", "open_clip"): "sdxl",
    ("open_clip",): "sdxl_refiner",
}
# Where an image encoder and the encoders of frames stand among the embedders -> the same.
LAYOUT_OF_FRAMES: dict[tuple[int, ...], str] = {
    (0, 3): "svd",
    (0, 1): "sv3d",
    (0, 1, 4): "sv4d",
    (0, 1, 4, 5): "sv4d",
}
# Buffers of the originals that are fields of the Schedule; their loaders miss them otherwise.
_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


class Encoder(NamedTuple):
    """An encoder of a network's conditions: its name, its kind and the place in layouts.

    number: which embedder of the network it is, counted from 0.
    """

    name: str
    kind: str
    slot: str
    embedder: Embedder
    number: int


class About(NamedTuple):
    """What a folder of diffusers says of a model beside its networks.

    data: the name of its data set. sampler, guidance: the sections. num_steps: of sampling.
    """

    data: str = "data of its own"
    sampler: Mapping[str, Any] | None = None
    guidance: Mapping[str, Any] | None = None
    num_steps: int = 50

    @property
    def scale(self) -> float:
        """The scale of guidance; 1 is none."""
        return scale_in(self.guidance)


def export_single_file(
    network: Network,
    noise: Noise,
    trained: Trained,
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> str:
    """Write one .safetensors file as the originals write theirs -> the name of its layout.

    trained.ema: averages of the network, written beside it as model_ema.*. The buffers of the
    schedule are written as the originals have them, and what claims.read_claims reads: marks of
    v-prediction, of zero terminal SNR and of EDM, and a learned scale factor.
    Raises ValueError for a model that no layout fits.
    """
    encoders = encoders_of(network)
    layout = _layout(encoders, _others(encoders, trained))
    prediction = prediction_of(noise)
    extras, metadata = _marks(noise, prediction), {}
    if prediction is not None:
        words = {"eps": "epsilon", "v_edm": "v"}
        metadata = {METADATA_KEY: words[prediction] if prediction in words else prediction}
    if layout in ("sd1", "sd2") and noise.on_timesteps:
        extras |= {name: np.asarray(getattr(noise.schedule, name)) for name in _BUFFERS}
    elif noise.sigmas is not None:
        extras["denoiser.sigmas"] = np.asarray(noise.sigmas)
    if network.first_stage is not None and network.first_stage.options.scale_by_std:
        extras["scale_factor"] = np.asarray(trained.frozen["scale_factor"], np.float32)
    components = _components(encoders, trained)
    ema = None if trained.ema is None else trained.ema["network"]
    export_checkpoint(
        path,
        components,
        layout,
        dtype=dtype,
        ema=ema,
        extras=extras,
        metadata=metadata,
        nonfinite=nonfinite,
    )
    return layout


def _marks(noise: Noise, prediction: str | None) -> dict[str, np.ndarray]:
    """Make the tensors by which other programs tell what a network predicts, and at which noise."""
    nothing = np.zeros((0,), np.float32)
    if prediction == "v_edm":
        grid = noise.grid(2)
        return {name: np.asarray(grid[1 - i], np.float32) for i, name in enumerate(EDM_LEVELS)}
    marks = {V_MARK: nothing} if prediction == "v" else {}
    return marks | ({ZERO_SNR_MARK: nothing} if is_zero_snr(noise) else {})


def export_diffusers(
    network: Network,
    noise: Noise,
    trained: Trained,
    folder: str | os.PathLike,
    *,
    about: About | None = None,
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a folder that diffusers loads as a whole pipeline, with tokenizers and a README.md.

    Raises ValueError for an option that has no counterpart in diffusers.
    """
    about = About() if about is None else about
    encoders, stage = encoders_of(network), network.first_stage
    components = _components(encoders, trained)
    is_video = isinstance(network.module, VideoUNet)
    scheduler, chosen = diffusers_scheduler(noise, about.sampler, is_video=is_video)
    configs = {"network": _network_config(network), "scheduler": scheduler}
    tokenizers = {
        encoder.slot: tokenizer_files(network.tokenize[encoder.embedder.text.tokens_key][1])
        for encoder in encoders
        if encoder.embedder.text is not None
    }
    scale = float(trained.frozen["scale_factor"]) if stage is not None else 1.0
    if stage is not None:
        codes = None if stage.codes is None else stage.codes.num_codes
        components, configs["first_stage"] = kind_of(stage.module).to_diffusers(
            stage.module, components, scale_factor=scale, num_codes=codes
        )
    for encoder in encoders:
        if encoder.slot not in components["conditioner"]:
            continue  # diffusers has it in the first stage
        module = encoder.embedder.module
        if encoder.kind == "image":
            configs[encoder.slot] = vision_config(module.tower)
            configs["feature_extractor"] = pixels_config(module.tower)
            continue
        if encoder.kind == "open_clip_legacy" and module.layer == "penultimate":
            # diffusers has no such choice: its SD 2 encoder ends one layer earlier.
            shortened = penultimate_text(components["conditioner"][encoder.slot])
            components["conditioner"][encoder.slot] = shortened
        own = components["conditioner"][encoder.slot]
        configs[encoder.slot] = text_config(
            own,
            num_heads=module.tower.num_heads,
            hidden_act=module.tower.activation,
            # The last of CLIP's tokens. With 2 a token that is added later would be taken for it.
            eos_token_id=len(own["embeddings"]["token_embedding"]["embedding"]) - 1,
        )
    card = functools.partial(
        model_card,
        data=about.data,
        num_steps=about.num_steps,
        scale=None if network.num_frames is not None else about.scale,
        scheduler=chosen,
    )
    save_diffusers(folder, components, configs, tokenizers, card, dtype=dtype, nonfinite=nonfinite)


def _network_config(network: Network) -> dict[str, Any]:
    module, height = network.module, network.image_shape[0]
    channels, numbers = channels_of(network)
    if isinstance(module, VideoUNet):
        assert network.num_frames is not None
        frames = {"sample_size": height, "num_frames": network.num_frames}
        return video_unet_config(module, channels, **frames, **numbers)
    return unet_config(module, channels, sample_size=height, **numbers)


def channels_of(network: Network) -> tuple[int, dict[str, Any]]:
    """Find the input channels of a network, and as time_dim the channels of its numbers, if any."""
    beside = conditioning_shapes(network.embedders, network.image_shape)
    extra = beside["concat"].shape[-1] if "concat" in beside else 0
    return network.image_shape[-1] + extra, _channels_of_numbers(network)


def _channels_of_numbers(network: Network) -> dict[str, Any]:
    """Find in how many channels each number of the conditions is embedded, if there are numbers."""
    modules = [embedder.module for embedder in network.embedders.values()]
    dims = {module.outdim for module in modules if isinstance(module, ConcatTimestepEmbedder)}
    if len(dims) > 1:
        raise ConfigError(
            f"config.conditioning.embedders has numbers of outdim {', '.join(map(str, dims))}, and "
            "diffusers has one for all of them"
        )
    return {"time_dim": dims.pop()} if dims else {}


def encoders_of(network: Network) -> list[Encoder]:
    """List the embedders that released files have a place for, in the order of the config."""
    found: list[Encoder] = []
    for number, (name, embedder) in enumerate(network.embedders.items()):
        module = embedder.module
        if isinstance(module, ClipText):
            kind, slot = "clip", "text"
        elif isinstance(module, OpenClipText):
            kind = "open_clip_legacy" if module.legacy else "open_clip"
            slot = "text" if module.legacy else "text_2"
        elif isinstance(module, OpenClipImage):
            kind = slot = "image"
        elif isinstance(module, EncodedFrames):
            before = sum(encoder.kind == "frames" for encoder in found)
            kind, slot = "frames", f"frames_{before + 1}" if before else "frames"
        else:
            continue
        found.append(Encoder(name, kind, slot, embedder, number))
    return found


def find_layout(network: Network, trained: Trained) -> str | None:
    """Name the layout of released files that export_single_file writes; None where none fits."""
    encoders = encoders_of(network)
    return None if _others(encoders, trained) else _find_layout(encoders)


def _others(encoders: list[Encoder], trained: Trained) -> list[str]:
    """Name the parts of the conditions that have weights and no place in released layouts."""
    both = {**trained.frozen["conditioner"], **trained.params["conditioner"]}
    named = {encoder.name for encoder in encoders}
    return [name for name, own in both.items() if name not in named and jax.tree.leaves(own)]


def _find_layout(encoders: list[Encoder]) -> str | None:
    kinds = tuple(encoder.kind for encoder in encoders)
    places = tuple(encoder.number for encoder in encoders)
    if kinds[:2] == ("image", "frames") and places in LAYOUT_OF_FRAMES:
        return LAYOUT_OF_FRAMES[places]
    return LAYOUT_OF_TEXTS[kinds] if kinds in LAYOUT_OF_TEXTS else None


def _layout(encoders: list[Encoder], others: list[str]) -> str:
    if others:
        raise ConfigError(
            f"no released layout has a place for config.conditioning.embedders.{others[0]}; "
            "--format=native writes all of a model"
        )
    layout = _find_layout(encoders)
    if layout is None:
        kinds = [encoder.kind for encoder in encoders]
        raise ConfigError(
            f"no released layout has the text encoders {kinds} of this model; the layouts "
            f"have {', '.join(str(list(k)) for k in LAYOUT_OF_TEXTS)}, and for videos an "
            f"image encoder and encoders of frames in the places "
            f"{', '.join(str(list(k)) for k in LAYOUT_OF_FRAMES)} of the embedders; "
            "--format=native writes any model"
        )
    return layout


def _components(encoders: list[Encoder], trained: Trained) -> dict[str, Any]:
    components: dict[str, Any] = {"network": trained.params["network"]}
    if trained.frozen["first_stage"]:
        components["first_stage"] = trained.frozen["first_stage"]
    if encoders:
        both = {**trained.frozen["conditioner"], **trained.params["conditioner"]}
        components["conditioner"] = {encoder.slot: both[encoder.name] for encoder in encoders}
    return components
