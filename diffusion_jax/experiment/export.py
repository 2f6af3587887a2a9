"""A model of this program -> a file or folder that other programs load."""

import os
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.diffusers_folder import (
    penultimate_text,
    save_diffusers,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from diffusion_jax.convert.weights.places import export_checkpoint
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.binding import ConfigError, value_of
from diffusion_jax.experiment.network import Network
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipText

# The text encoders of a network, in order, and the layout whose places are theirs.
LAYOUT_OF_TEXTS: dict[tuple[str, ...], str] = {
    ("clip",): "sd1",
    ("open_clip_legacy",): "sd2",
    ("clip", "open_clip"): "sdxl",
    ("open_clip",): "sdxl_refiner",
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


class Text(NamedTuple):
    """A text encoder of a network: its name, its kind and the place that layouts give it."""

    name: str
    kind: str
    slot: str
    embedder: Embedder


def export_single_file(
    network: Network,
    noise: Noise,
    trained: Trained,
    path: str | os.PathLike,
    *,
    dtype: Any = None,
) -> str:
    """Write one .safetensors file as the originals write theirs -> the name of its layout.

    trained.ema: averages of the network, written beside it as model_ema.*. The buffers of the
    schedule are written as the originals have them. Raises ValueError for a model that no layout
    fits.
    """
    texts = _texts(network)
    layout = _layout(texts)
    schedule = noise.schedule
    if layout in ("sd1", "sd2"):
        extras = {name: np.asarray(getattr(schedule, name)) for name in _BUFFERS}
    else:
        extras = {"denoiser.sigmas": np.asarray(schedule.sqrt_recipm1_alphas_cumprod)}
    components = _components(texts, trained)
    ema = None if trained.ema is None else trained.ema["network"]
    export_checkpoint(path, components, layout, dtype=dtype, ema=ema, extras=extras)
    return layout


def export_diffusers(
    network: Network,
    noise: Noise,
    trained: Trained,
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
) -> None:
    """Write a folder that diffusers loads; tokenizers, which it wants beside, are not written.

    Raises ValueError for an option that has no counterpart in diffusers.
    """
    texts, stage = _texts(network), network.first_stage
    height, _, channels = network.image_shape
    extra = sum(e.channels for e in network.embedders.values() if e.channels is not None)
    configs = {
        "network": unet_config(network.module, channels + extra, sample_size=height),
        "scheduler": _scheduler(noise),
    }
    if stage is not None:
        configs["first_stage"] = vae_config(
            stage.module,
            scale_factor=float(trained.frozen["scale_factor"]),
            num_codes=None if stage.codes is None else stage.codes.num_codes,
        )
    components = _components(texts, trained)
    for text in texts:
        tower = text.embedder.module.tower
        if text.kind == "open_clip_legacy" and text.embedder.module.layer == "penultimate":
            # diffusers has no such choice: its SD 2 encoder ends one layer earlier.
            shortened = penultimate_text(components["conditioner"][text.slot])
            components["conditioner"][text.slot] = shortened
        configs[text.slot] = text_config(
            components["conditioner"][text.slot],
            num_heads=tower.num_heads,
            hidden_act=tower.activation,
        )
    save_diffusers(folder, components, configs, dtype=dtype)


def _scheduler(noise: Noise) -> dict[str, Any]:
    options = noise.schedule_options
    return scheduler_config(
        beta_start=value_of(make_schedule, options, "linear_start"),
        beta_end=value_of(make_schedule, options, "linear_end"),
        schedule=options["name"],
        prediction_type=_PREDICTIONS[noise.parameterization],
        num_timesteps=noise.schedule.num_timesteps,
    )


def _texts(network: Network) -> list[Text]:
    texts = []
    for name, embedder in network.embedders.items():
        module = embedder.module
        if isinstance(module, ClipText):
            texts.append(Text(name, "clip", "text", embedder))
        elif isinstance(module, OpenClipText):
            kind = "open_clip_legacy" if module.legacy else "open_clip"
            texts.append(Text(name, kind, "text" if module.legacy else "text_2", embedder))
    return texts


def _layout(texts: list[Text]) -> str:
    kinds = tuple(text.kind for text in texts)
    if kinds not in LAYOUT_OF_TEXTS:
        raise ConfigError(
            f"no released layout has the text encoders {list(kinds)} of this model; the layouts "
            f"have {', '.join(str(list(k)) for k in LAYOUT_OF_TEXTS)}"
        )
    return LAYOUT_OF_TEXTS[kinds]


def _components(texts: list[Text], trained: Trained) -> dict[str, Any]:
    components: dict[str, Any] = {"network": trained.params["network"]}
    if trained.frozen["first_stage"]:
        components["first_stage"] = trained.frozen["first_stage"]
    if texts:
        both = {**trained.frozen["conditioner"], **trained.params["conditioner"]}
        components["conditioner"] = {text.slot: both[text.name] for text in texts}
    return components
