"""What a released file says of its own model against what a config says, before it is loaded."""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.claims import (
    NOISE_ALONE,
    Claims,
    find_schedule,
    read_claims,
    same_levels,
)
from diffusion_jax.experiment.config.binding import parameters_of
from diffusion_jax.experiment.first_stage.frozen import FirstStage
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.sampling import TIMESTEP_SAMPLERS
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipText
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.models.unet.video_unet import as_image_unet

# The weighting that belongs to a scaling -> what the network predicts.
_PREDICTIONS = {"eps": "eps", "v": "v", "unit": "x0", "edm": "edm", "flow": "flow"}
_DATA = "sigma_data"
_CONTINUOUS = ("edm", "v_edm")


class Contradiction(NamedTuple):
    """One difference: what the file says, what the config says, and the overrides that agree.

    overrides: {"section.key": value}; empty where no option of a config can agree.
    """

    claimed: str
    here: str
    overrides: dict[str, Any]


def contradictions(
    network: Network, noise: Noise, sampler: Mapping[str, Any], path: str | os.PathLike
) -> list[Contradiction]:
    """Compare what a released file or folder says of its model with the model of a config.

    sampler: the section of the config. Raises what read_claims raises.
    """
    claims = read_claims(path)
    found = [
        *_of_prediction(claims, noise),
        *_of_levels(claims, noise),
        *_of_module(claims, network.module),
        *_of_first_stage(claims, network.first_stage),
        *_of_towers(claims, network),
    ]
    name = sampler["name"]
    chooses = name in TIMESTEP_SAMPLERS and "discretize" in parameters_of(TIMESTEP_SAMPLERS[name])
    visits = sampler["discretize"] if "discretize" in sampler else "its default"
    if claims.spacing == "trailing" and chooses and visits != "trailing":
        overrides = {"sampler.discretize": "trailing"}
        found.append(Contradiction("timestep_spacing = 'trailing'", visits, overrides))
    if claims.unreadable:
        found.append(Contradiction(", ".join(claims.unreadable), "none of it", {}))
    return found


def autoencoder_contradictions(
    module: Autoencoder | VideoAutoencoder, path: str | os.PathLike
) -> list[Contradiction]:
    """Compare what a released file or folder says of its autoencoder with the one of a config."""
    return _of_autoencoder(read_claims(path), module, "model")


def check_first_stage_claims(stage: FirstStage, path: str | os.PathLike) -> None:
    """Raise ValueError when the released file of a first stage contradicts its section."""
    claims = read_claims(path)
    found = _of_first_stage(claims, stage)
    if claims.unreadable:
        found.append(Contradiction(", ".join(claims.unreadable), "none of it", {}))
    check_claims(found, path)


def check_claims(found: list[Contradiction], path: str | os.PathLike) -> None:
    """Raise ValueError for contradictions, with the exact overrides to add."""
    if not found:
        return
    differences = "; ".join(f"it says {one.claimed}, the config says {one.here}" for one in found)
    advice = overrides_of(found)
    add = f"add {' '.join(advice)}, or " if advice else ""
    raise ValueError(
        f"{path} contradicts the config: {differences}; {add}set --config.train.ckpt_check=False "
        "to use it as the config says"
    )


def overrides_of(found: list[Contradiction]) -> list[str]:
    """Write the overrides that agree with a file as flags of the command line."""
    joined = {key: value for one in found for key, value in one.overrides.items()}
    return [f"--config.{key}={value}" for key, value in joined.items()]


def prediction_of(noise: Noise) -> str | None:
    """Name what a network predicts as Claims does; None for a scaling of the user's own.

    It is None, too, for what is denoised around a picture: no released file has that.
    """
    if noise.natural_weighting is None or noise.around is not None:
        return None
    kind = _PREDICTIONS[noise.natural_weighting["name"]]
    return "v_edm" if kind == "v" and noise.levels is None else kind


def alphas_cumprod_of(noise: Noise) -> np.ndarray:
    """Compute abar of the timesteps of a discrete denoiser, float64 [T]."""
    return 1.0 / (1.0 + np.asarray(noise.sigmas, np.float64) ** 2)


def is_zero_snr(noise: Noise) -> bool:
    """Tell whether the last timestep is noise alone."""
    return noise.sigmas is not None and bool(alphas_cumprod_of(noise)[-1] < NOISE_ALONE)


def _of_prediction(claims: Claims, noise: Noise) -> list[Contradiction]:
    here, claimed = prediction_of(noise), claims.prediction
    if claimed is None or here is None:
        return []
    if claimed in _CONTINUOUS:
        return _of_edm(claims, noise)
    if claimed == here:
        return []
    overrides = {} if noise.on_timesteps else {"denoiser": "delete"}
    if claimed in ("eps", "v", "x0"):
        overrides["schedule.parameterization"] = claimed
    elif claimed == "flow":
        overrides = {"denoiser.name": "continuous", "denoiser.scaling.name": "flow"}
        overrides["discretization.name"] = "flow"
    else:
        overrides = {}
    return [Contradiction(f"that the network predicts {claimed}", here, overrides)]


def _of_edm(claims: Claims, noise: Noise) -> list[Contradiction]:
    here: dict[str, Any] = {"prediction": prediction_of(noise)}
    if noise.levels is None:
        highest, lowest, _ = noise.grid(2)
        here |= {"sigma_min": float(lowest), "sigma_max": float(highest)}
        if claims.prediction == "edm":
            here["sigma_data"] = ({"sigma_data": 0.5} | dict(noise.natural_weighting or {}))[_DATA]
    claimed = claims._asdict()
    differ = [
        name
        for name, value in here.items()
        if claimed[name] is not None and not _equal(value, claimed[name])
    ]
    if not differ:
        return []
    overrides = {
        "denoiser.name": "continuous",
        "denoiser.scaling.name": claims.prediction,
        "denoiser.scaling.sigma_data": claims.sigma_data if claims.prediction == "edm" else None,
        "discretization.name": "edm",
        "discretization.sigma_min": claims.sigma_min,
        "discretization.sigma_max": claims.sigma_max,
    }
    if noise.levels is not None:  # what trains and draws on the timesteps of a schedule
        overrides |= {
            "loss.name": "denoiser",
            "sigma_sampling.name": "lognormal",
            "sampler": "{'name': 'euler', 'num_steps': 50}",
        }
    wanted, others = (
        ", ".join(f"{name} = {side[name]}" for name in differ) for side in (claimed, here)
    )
    given = {name: value for name, value in overrides.items() if value is not None}
    return [Contradiction(wanted, others, given)]


def _of_levels(claims: Claims, noise: Noise) -> list[Contradiction]:
    """Compare the noise levels of timesteps; a continuous denoiser has none."""
    if noise.sigmas is None or claims.prediction in _CONTINUOUS:
        return []
    here, claimed, is_zero = alphas_cumprod_of(noise), claims.alphas_cumprod, is_zero_snr(noise)
    if claimed is not None and not same_levels(claimed, here):
        options = claims.schedule or find_schedule(claimed)
        known = {} if options is None else {f"schedule.{key}": v for key, v in options.items()}
        if known and (is_zero or claimed[-1] < NOISE_ALONE):
            known["schedule.rescale_zero_snr"] = bool(claimed[-1] < NOISE_ALONE)
        if known and not noise.on_timesteps:
            known["denoiser"] = "delete"
        ends = f"{claimed[0]:.6g} to {claimed[-1]:.6g}"
        text = f"{len(claimed)} timesteps with alphas_cumprod from {ends}"
        ours = f"{len(here)} from {here[0]:.6g} to {here[-1]:.6g}"
        return [Contradiction(text, ours, known)]
    if claimed is None and claims.zero_snr and not is_zero:
        overrides = {"schedule.rescale_zero_snr": True}
        return [Contradiction("that the last timestep is noise alone", "not so", overrides)]
    return []


def _of_first_stage(claims: Claims, stage: FirstStage | None) -> list[Contradiction]:
    if stage is None:
        return []
    found = _of_autoencoder(claims, stage.module, "first_stage")
    claimed, here = claims.scale_factor, stage.options.scale_factor
    if claimed is None or stage.options.scale_by_std or math.isclose(claimed, here, rel_tol=2e-3):
        return found
    overrides = {"first_stage.scale_factor": float(f"{claimed:.6g}")}
    return [*found, Contradiction(f"scale_factor = {claimed:.6g}", f"{here:.6g}", overrides)]


def _of_autoencoder(claims: Claims, module: Any, section: str) -> list[Contradiction]:
    groups = claims.vae_groups
    if groups is None or module.num_groups == groups:
        return []
    claimed = f"norm_num_groups = {groups} of the autoencoder"
    return [Contradiction(claimed, str(module.num_groups), {f"{section}.num_groups": groups})]


def _of_towers(claims: Claims, network: Network) -> list[Contradiction]:
    kinds = (ClipText, OpenClipText)
    texts = {n: e.module.tower for n, e in network.embedders.items() if isinstance(e.module, kinds)}
    if len(texts) != len(claims.towers):
        return []
    found = []
    for (name, tower), (activation, heads) in zip(texts.items(), claims.towers, strict=True):
        if activation not in (None, tower.activation):
            found.append(Contradiction(f"hidden_act = {activation!r}", tower.activation, {}))
        if heads not in (None, tower.num_heads):
            overrides = {f"conditioning.embedders.{name}.num_heads": heads}
            found.append(
                Contradiction(f"num_attention_heads = {heads}", str(tower.num_heads), overrides)
            )
    return found


def _of_module(claims: Claims, module: Any) -> list[Contradiction]:
    module = as_image_unet(module)
    if module is None:
        return []
    found = []
    if claims.num_groups not in (None, module.num_groups):
        claimed = f"norm_num_groups = {claims.num_groups}"
        overrides = {"model.num_groups": claims.num_groups}
        found.append(Contradiction(claimed, str(module.num_groups), overrides))
    levels = range(len(module.channel_mult))
    attend = [i for i in levels if 2**i in module.attention_resolutions or i == levels[-1]]
    widths = [module.model_channels * mult for mult in module.channel_mult]
    per_head, heads = module.num_head_channels, claims.heads
    here = [module.num_heads if per_head == -1 else width // per_head for width in widths]
    if heads is None:
        return found
    claimed = list(heads) if isinstance(heads, tuple) else [heads] * len(widths)
    if len(claimed) != len(widths) or [claimed[i] for i in attend] == [here[i] for i in attend]:
        return found
    channels = {widths[i] / claimed[i] for i in attend}
    overrides = {}
    if len({claimed[i] for i in attend}) == 1:
        overrides = {"model.num_head_channels": -1, "model.num_heads": claimed[attend[0]]}
    elif len(channels) == 1:
        overrides = {"model.num_head_channels": int(channels.pop())}
    return [*found, Contradiction(f"attention heads {claimed}", str(here), overrides)]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-3)
    return one == other
