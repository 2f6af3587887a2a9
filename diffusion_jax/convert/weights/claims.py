"""What a file or folder says of its own model: prediction, noise levels, scale factor, heads.

Weights of one shape are used in different ways. Files say which by tensors that mark them, by words
in their header and by buffers; folders of diffusers say it in their configs.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.reading import (
    Weights,
    diffusers_components,
    open_weights,
    read_json,
)
from diffusion_jax.diffusion.schedule import make_beta_schedule, rescale_zero_terminal_snr

# The words of headers and of scheduler_config.json for what a network predicts.
PREDICTIONS = {
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v_prediction": "v",
    "v_pred": "v",
    "sample": "x0",
    "edm": "edm",
}
METADATA_KEY = "modelspec.prediction_type"
# Tensors that mark a file; these two are empty, and the levels are single numbers.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
EDM_LEVELS = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
EDM_MARK = "edm_mean"
_TEXTS = ("text_encoder", "text_encoder_2")
MAX_TIMESTEPS = 100_000
# (name here, start, end) of the schedules of released models.
_KNOWN_SCHEDULES = (
    ("linear", 0.00085, 0.012),
    ("linear", 0.0015, 0.0195),
    ("linear", 0.0015, 0.0155),
    ("sqrt_linear", 1e-4, 2e-2),
    ("linear", 1e-4, 2e-2),
    ("cosine", 1e-4, 2e-2),
)
SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}


class Claims(NamedTuple):
    """What is said, None where nothing is said.

    prediction: "eps", "v", "x0", "edm" (EDM's own) or "v_edm" (v on EDM's levels). zero_snr:
    whether the last timestep is noise alone. alphas_cumprod: float64 [T]. schedule: options of
    config.schedule. sigma_min, sigma_max, sigma_data: of EDM. scale_factor: of the latents. heads:
    of the attention at each level, or one number; num_groups: of the norms. spacing: "trailing"
    and so on, the timesteps that sampling visits. towers: (activation, heads) of the text encoders.
    unreadable: what is said and has no place here.
    """

    prediction: str | None = None
    zero_snr: bool | None = None
    alphas_cumprod: np.ndarray | None = None
    schedule: dict[str, Any] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    scale_factor: float | None = None
    heads: tuple[int, ...] | int | None = None
    num_groups: int | None = None
    spacing: str | None = None
    towers: tuple[tuple[str | None, int | None], ...] = ()
    unreadable: tuple[str, ...] = ()


def read_claims(path: str | os.PathLike) -> Claims:
    """Read what a file, or a folder of diffusers, says of its own model.

    Raises ValueError for a damaged config of a folder, and what open_weights raises.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path) if diffusers_components(path) else Claims()
    return claims_of(open_weights(path))


def claims_of(weights: Weights) -> Claims:
    """Read what the marks, the buffers and the header of a file say."""
    tensors, words = weights.tensors, weights.metadata
    found: dict[str, Any] = {}
    said = words[METADATA_KEY].lower() if METADATA_KEY in words else None
    if said is not None:
        found["prediction"] = PREDICTIONS[said] if said in PREDICTIONS else said
    if V_MARK in tensors:
        found["prediction"] = "v"
    if ZERO_SNR_MARK in tensors:
        found["zero_snr"] = True
    if EDM_LEVELS[1] in tensors:
        found |= {"prediction": "v_edm", "sigma_data": 1.0}
        found |= {
            name.partition(".")[2]: _number(weights, name) for name in EDM_LEVELS if name in tensors
        }
    if EDM_MARK in tensors:
        found |= {"prediction": "edm", "unreadable": ("latents normalised by edm_mean, edm_std",)}
    if "scale_factor" in tensors:
        found["scale_factor"] = _number(weights, "scale_factor")
    if "alphas_cumprod" in tensors:
        found["alphas_cumprod"] = _table(weights, "alphas_cumprod")
    elif "denoiser.sigmas" in tensors:
        found["alphas_cumprod"] = 1.0 / (1.0 + _table(weights, "denoiser.sigmas") ** 2)
    return Claims(**found)


def _table(weights: Weights, name: str) -> np.ndarray:
    tensor = weights.tensors[name]
    if len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= MAX_TIMESTEPS:
        raise ValueError(
            f"{weights.path}: {name} has the shape {tensor.shape} and should be a list of at most "
            f"{MAX_TIMESTEPS:,} numbers"
        )
    return tensor.load().astype(np.float64)


def _number(weights: Weights, name: str) -> float:
    array = weights.tensors[name].load()
    if array.size != 1 or not np.isfinite(array).all():
        raise ValueError(
            f"{weights.path}: {name} has the shape {array.shape} and should be a number"
        )
    return float(array.reshape(()))


def _of_folder(folder: Path) -> Claims:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    found: dict[str, Any] = {}
    if scheduler:
        found |= _of_scheduler(scheduler)
    if unet:
        # diffusers expects numbers of heads under the name attention_head_dim.
        heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
        found["heads"] = tuple(heads) if isinstance(heads, list) else heads
        found["num_groups"] = unet.get("norm_num_groups", 32)
    texts = [
        read_json(folder / part / "config.json") for part in _TEXTS if (folder / part).is_dir()
    ]
    found["towers"] = tuple(
        (text.get("hidden_act"), text.get("num_attention_heads")) for text in texts
    )
    if vae.get("_class_name") == "AutoencoderKL":
        found["scale_factor"] = vae.get("scaling_factor", 0.18215)
        shifts = [key for key in ("shift_factor", "latents_mean") if vae.get(key) is not None]
        found["unreadable"] = tuple(f"{key} in vae/config.json" for key in shifts)
    return Claims(**found)


def _of_scheduler(given: dict[str, Any]) -> dict[str, Any]:
    """Read a scheduler_config.json, whose options have defaults of diffusers."""
    prediction = str(given.get("prediction_type", "epsilon"))
    found: dict[str, Any] = {"prediction": PREDICTIONS.get(prediction, prediction)}
    if str(given.get("_class_name")).startswith("EDM"):
        kinds = {"eps": "edm", "v": "v_edm"}
        found["prediction"] = kinds.get(found["prediction"], found["prediction"])
        levels = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        return found | {name: given.get(name, value) for name, value in levels.items()}
    found["zero_snr"] = bool(given.get("rescale_betas_zero_snr", False))
    found["spacing"] = given.get("timestep_spacing")
    number = given.get("num_train_timesteps", 1000)
    name = given.get("beta_schedule", "linear")
    if given.get("trained_betas") is not None:
        betas = np.asarray(given["trained_betas"], np.float64)
    elif name in SCHEDULES:
        options = {
            "linear_start": given.get("beta_start", 1e-4),
            "linear_end": given.get("beta_end", 2e-2),
        }
        found["schedule"] = {"name": SCHEDULES[name], "num_timesteps": number, **options}
        betas = make_beta_schedule(SCHEDULES[name], number, **options)
    else:
        return found | {"unreadable": (f"beta_schedule {name!r} in scheduler_config.json",)}
    betas = rescale_zero_terminal_snr(betas) if found["zero_snr"] else betas
    return found | {"alphas_cumprod": np.cumprod(1.0 - betas)}


def find_schedule(alphas_cumprod: np.ndarray) -> dict[str, Any] | None:
    """Find the options of config.schedule that give these noise levels; None if none is known."""
    count, betas = len(alphas_cumprod), 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    ends = (float(f"{betas[0]:.3g}"), float(f"{betas[-1]:.3g}"))
    solved = [(name, *ends) for name in ("linear", "sqrt_linear") if 0 < min(ends) < max(ends) < 1]
    for name, start, end in (*_KNOWN_SCHEDULES, *solved):
        plain = make_beta_schedule(name, count, linear_start=start, linear_end=end)
        for zero_snr in (False, True) if count > 1 else (False,):
            tried = rescale_zero_terminal_snr(plain) if zero_snr else plain
            if same_levels(np.cumprod(1.0 - tried), alphas_cumprod):
                options: dict[str, Any] = {"name": name, "num_timesteps": count}
                if name in ("linear", "sqrt_linear"):
                    options |= {"linear_start": start, "linear_end": end}
                return options | ({"rescale_zero_snr": True} if zero_snr else {})
    return None


def same_levels(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two tables of alphas_cumprod agree, as far as float16 can say it."""
    return one.shape == other.shape and np.allclose(one, other, rtol=5e-3, atol=2e-5)
