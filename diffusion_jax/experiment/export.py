"""A model of this program -> a file or folder that other programs load."""

import os
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.claims import (
    EDM_LEVELS,
    METADATA_KEY,
    SCHEDULES,
    V_MARK,
    ZERO_SNR_MARK,
)
from diffusion_jax.convert.weights.diffusers_folder import (
    edm_scheduler_config,
    flow_scheduler_config,
    penultimate_text,
    save_diffusers,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from diffusion_jax.convert.weights.diffusers_video import (
    join_vae,
    levels_config,
    pixels_config,
    video_unet_config,
    video_vae_config,
    vision_config,
)
from diffusion_jax.convert.weights.places import export_checkpoint
from diffusion_jax.diffusion.samplers.sigmas import FLOW_NOISE
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.binding import ConfigError, value_of
from diffusion_jax.experiment.claims import alphas_cumprod_of, is_zero_snr, prediction_of
from diffusion_jax.experiment.network import Network, conditioning_shapes
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.embedders import ConcatTimestepEmbedder
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipImage, OpenClipText
from diffusion_jax.models.conditioning.video_embedders import EncodedFrames
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
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
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
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
    encoders = _encoders(network)
    layout = _layout(encoders)
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
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a folder that diffusers loads; tokenizers, which it wants beside, are not written.

    Raises ValueError for an option that has no counterpart in diffusers.
    """
    encoders, stage = _encoders(network), network.first_stage
    components = _components(encoders, trained)
    is_video = isinstance(network.module, VideoUNet)
    configs = {"network": _network_config(network), "scheduler": _scheduler(noise, is_video)}
    scale = float(trained.frozen["scale_factor"]) if stage is not None else 1.0
    if stage is not None and isinstance(stage.module, VideoAutoencoder):
        configs["first_stage"] = video_vae_config(stage.module, scale_factor=scale)
        frames = components.get("conditioner", {}).pop("frames", None)
        components["first_stage"] = join_vae(components["first_stage"], frames)
    elif stage is not None:
        codes = None if stage.codes is None else stage.codes.num_codes
        configs["first_stage"] = vae_config(stage.module, scale_factor=scale, num_codes=codes)
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
        configs[encoder.slot] = text_config(
            components["conditioner"][encoder.slot],
            num_heads=module.tower.num_heads,
            hidden_act=module.tower.activation,
        )
    save_diffusers(folder, components, configs, dtype=dtype, nonfinite=nonfinite)


def _network_config(network: Network) -> dict[str, Any]:
    height, _, channels = network.image_shape
    beside = conditioning_shapes(network.embedders, network.image_shape)
    extra = beside["concat"].shape[-1] if "concat" in beside else 0
    module = network.module
    if isinstance(module, VideoUNet):
        assert network.num_frames is not None
        return video_unet_config(
            module,
            channels + extra,
            sample_size=height,
            num_frames=network.num_frames,
            time_dim=_channels_of_numbers(network),
        )
    return unet_config(module, channels + extra, sample_size=height)


def _channels_of_numbers(network: Network) -> int:
    """Find in how many channels each number of the conditions is embedded."""
    modules = [embedder.module for embedder in network.embedders.values()]
    widths = {m.outdim for m in modules if isinstance(m, ConcatTimestepEmbedder)}
    if len(widths) != 1:
        raise ConfigError(
            f"numbers of this model are embedded in {sorted(widths)} channels; diffusers has one "
            "width for all; export this model as .safetensors"
        )
    return widths.pop()


def _scheduler(noise: Noise, is_video: bool) -> dict[str, Any]:
    prediction = prediction_of(noise)
    if is_video and prediction != "v_edm":
        raise ConfigError(
            f"config.denoiser predicts {prediction}, and diffusers' pipeline of videos needs "
            "v_edm; export this model as .safetensors"
        )
    if is_video:
        return levels_config(**_levels(noise))
    if prediction in ("edm", "v_edm"):
        natural = {"sigma_data": 0.5} | dict(noise.natural_weighting or {})
        return edm_scheduler_config(prediction, **_levels(noise), sigma_data=natural["sigma_data"])
    if prediction == "flow":
        grid = noise.grid(2)
        return flow_scheduler_config(float(grid[1]) if grid[0] == FLOW_NOISE else 1.0)
    if prediction is None or noise.sigmas is None or not noise.quantize_c_noise:
        raise ConfigError(
            "config.denoiser has no counterpart among the schedulers of diffusers; export this "
            "model as .safetensors"
        )
    options, zero_snr = noise.schedule_options, is_zero_snr(noise)
    said = {
        "prediction_type": _PREDICTIONS[prediction],
        "num_timesteps": len(noise.sigmas),
        "zero_snr": zero_snr,
    }
    given = value_of(make_schedule, options, "given_betas")
    if noise.on_timesteps and given is None and options["name"] in SCHEDULES.values():
        start, end = (value_of(make_schedule, options, f"linear_{end}") for end in ("start", "end"))
        return scheduler_config(beta_start=start, beta_end=end, schedule=options["name"], **said)
    abar = alphas_cumprod_of(noise)
    if zero_snr:
        abar[-1] = 0.0
    return scheduler_config(betas=1.0 - abar / np.append(1.0, abar[:-1]), **said)


def _levels(noise: Noise) -> dict[str, float]:
    """Find the ends of the noise levels, without the error of the powers that give them."""
    highest, lowest, _ = noise.grid(2)
    ends = {"sigma_min": lowest, "sigma_max": highest}
    return {name: float(f"{level:.6g}") for name, level in ends.items()}


def _encoders(network: Network) -> list[Encoder]:
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


def _layout(encoders: list[Encoder]) -> str:
    kinds = tuple(encoder.kind for encoder in encoders)
    places = tuple(encoder.number for encoder in encoders)
    if kinds[:2] == ("image", "frames") and places in LAYOUT_OF_FRAMES:
        return LAYOUT_OF_FRAMES[places]
    if kinds not in LAYOUT_OF_TEXTS:
        raise ConfigError(
            f"no released layout has the text encoders {list(kinds)} of this model; the layouts "
            f"have {', '.join(str(list(k)) for k in LAYOUT_OF_TEXTS)}, and those of videos an "
            f"image encoder and encoders of frames in the places "
            f"{', '.join(str(list(k)) for k in LAYOUT_OF_FRAMES)} of the embedders"
        )
    return LAYOUT_OF_TEXTS[kinds]


def _components(encoders: list[Encoder], trained: Trained) -> dict[str, Any]:
    components: dict[str, Any] = {"network": trained.params["network"]}
    if trained.frozen["first_stage"]:
        components["first_stage"] = trained.frozen["first_stage"]
    if encoders:
        both = {**trained.frozen["conditioner"], **trained.params["conditioner"]}
        components["conditioner"] = {encoder.slot: both[encoder.name] for encoder in encoders}
    return components
