"""What a file or folder says of its own model: prediction, noise levels, scale factor, heads.

Weights of one shape are used in different ways. Files say which by tensors that mark them, by words
in their header and by buffers; folders of diffusers say it in their configs.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.reading import (
    STEMS,
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
    "flow": "flow",
    "flow_prediction": "flow",
}
METADATA_KEY = "modelspec.prediction_type"
# Tensors that mark a file; these two are empty, and the levels are single numbers.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
EDM_LEVELS = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
EDM_MARK = "edm_mean"
_HEADS = "attention_head_dim"
_TEXTS = ("text_encoder", "text_encoder_2")
_CONFIGS = (
    "scheduler/scheduler_config.json",
    *(f"{x}/config.json" for x in ("unet", "vae", *_TEXTS)),
)
# abar of the last timestep below which that is noise alone.
NOISE_ALONE = 1e-6
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

    prediction: "eps", "v", "x0", "edm" (EDM's own), "v_edm" (v on EDM's levels) or
    "flow" (the velocity of flow matching). zero_snr:
    whether the last timestep is noise alone. alphas_cumprod: float64 [T]. schedule: options of
    config.schedule. sigma_min, sigma_max, sigma_data: of EDM. scale_factor: of the latents. heads:
    of the attention at each level, or one number; num_groups: of the norms, vae_groups: of those in
    the autoencoder. spacing: "trailing"
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
    vae_groups: int | None = None
    spacing: str | None = None
    towers: tuple[tuple[str | None, int | None], ...] = ()
    unreadable: tuple[str, ...] = ()


def read_claims(path: str | os.PathLike) -> Claims:
    """Read what a file, or a folder of diffusers or a part of one, says of its own model.

    A file that has not changed since is not read again.
    Raises ValueError for a damaged config of a folder, and what open_weights raises.
    """
    path = Path(os.path.expanduser(path))
    own = [path / name for name in ("model_index.json", "config.json", *_CONFIGS)]
    read = own if path.is_dir() else [path, path.parent / "config.json"]
    stamps = [file.stat() for file in read if file.is_file()]
    return _read(path, tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stamps))


@functools.lru_cache(maxsize=8)
def _read(path: Path, stamps: tuple[Any, ...]) -> Claims:
    """Read the claims of files that have these stamps."""
    if path.is_dir():
        found = _of_folder(path) if diffusers_components(path) else _of_vae(path / "config.json")
        return Claims(**found)
    claims = claims_of(open_weights(path))
    # The autoencoder of a folder may be named by its file.
    beside = _of_vae(path.parent / "config.json") if path.name.startswith(STEMS) else {}
    return claims._replace(**beside)


def claims_of(weights: Weights) -> Claims:
    """Read what the marks, the buffers and the header of a file say."""
    tensors, words = weights.tensors, weights.metadata
    found: dict[str, Any] = {}
    prediction = words[METADATA_KEY].lower() if METADATA_KEY in words else None
    if prediction is not None:
        found["prediction"] = PREDICTIONS[prediction] if prediction in PREDICTIONS else prediction
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
    if ZERO_SNR_MARK in tensors and "alphas_cumprod" in found:
        # Buffers are older than marks: the table may be the one that was stretched later.
        found["alphas_cumprod"] = _stretched(found["alphas_cumprod"])
    return Claims(**found)


def _stretched(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Stretch a table to zero terminal SNR; one that ends there stays as it is."""
    if len(alphas_cumprod) < 2 or alphas_cumprod[-1] < NOISE_ALONE:
        return alphas_cumprod
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return np.cumprod(1.0 - rescale_zero_terminal_snr(betas))


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


def _of_folder(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        found |= _of_scheduler(path)
    path = folder / "unet" / "config.json"
    if path.is_file():
        # diffusers expects numbers of heads under the name attention_head_dim.
        name = "num_attention_heads" if read_json(path).get("num_attention_heads") else _HEADS
        heads = _value(path, name, 8, (int, list))
        found["heads"] = tuple(heads) if isinstance(heads, list) else heads
        if not all(type(n) is int and n > 0 for n in np.ravel(heads).tolist()):
            raise ValueError(f"{path}: {name} = {heads!r:.60} should be numbers of heads")
        found["num_groups"] = _value(path, "norm_num_groups", 32, int)
    texts = [folder / part / "config.json" for part in _TEXTS if (folder / part).is_dir()]
    found["towers"] = tuple(
        (_value(text, "hidden_act", None, str), _value(text, "num_attention_heads", None, int))
        for text in texts
    )
    vae = _of_vae(folder / "vae" / "config.json")
    unreadable = [*found.pop("unreadable", ()), *vae.pop("unreadable", ())]
    return found | vae | {"unreadable": tuple(unreadable)}


def _of_vae(path: Path) -> dict[str, Any]:
    """Read the config of an autoencoder with a Gaussian posterior; {} for any other file."""
    vae = read_json(path)
    if not str(vae.get("_class_name")).startswith("AutoencoderKL"):
        return {}
    shifts = [key for key in ("shift_factor", "latents_mean") if vae.get(key) is not None]
    factor = _value(path, "scaling_factor", 0.18215, (int, float))
    if not 0.0 < factor < math.inf:
        raise ValueError(f"{path}: scaling_factor = {factor} should be above 0")
    return {
        "scale_factor": factor,
        "vae_groups": _value(path, "norm_num_groups", None, int),
        "unreadable": tuple(f"{key} in vae/config.json" for key in shifts),
    }


def _value(path: Path, key: str, default: Any, kind: Any) -> Any:
    """Look up an option of diffusers in a config; ValueError for a value of another kind."""
    given = read_json(path).get(key)
    if given is None:
        return default
    if not isinstance(given, kind) or isinstance(given, bool) != (kind is bool):
        raise ValueError(f"{path}: {key} = {given!r:.60} should be of another kind")
    return given


def _of_scheduler(path: Path) -> dict[str, Any]:
    """Read a scheduler_config.json, whose options have defaults of diffusers."""
    number = (int, float)
    prediction = _value(path, "prediction_type", "epsilon", str)
    found: dict[str, Any] = {"prediction": PREDICTIONS.get(prediction, prediction)}
    if _value(path, "_class_name", "", str).startswith("EDM"):
        kinds = {"eps": "edm", "v": "v_edm"}
        found["prediction"] = kinds.get(found["prediction"], found["prediction"])
        levels = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        return found | {name: _value(path, name, value, number) for name, value in levels.items()}
    if _value(path, "_class_name", "", str).startswith("FlowMatch"):
        return {"prediction": "flow"}
    is_continuous = _value(path, "timestep_type", "discrete", str) == "continuous"
    if is_continuous and found["prediction"] == "v":
        levels = {name: _value(path, name, None, number) for name in ("sigma_min", "sigma_max")}
        return {"prediction": "v_edm", "sigma_data": 1.0, **levels}
    found["zero_snr"] = _value(path, "rescale_betas_zero_snr", False, bool)
    found["spacing"] = _value(path, "timestep_spacing", None, str)
    count = _value(path, "num_train_timesteps", 1000, int)
    name = _value(path, "beta_schedule", "linear", str)
    trained = _value(path, "trained_betas", None, list)
    options = {
        "linear_start": _value(path, "beta_start", 1e-4, number),
        "linear_end": _value(path, "beta_end", 2e-2, number),
    }
    if trained is None and name not in SCHEDULES:
        return found | {"unreadable": (f"beta_schedule {name!r} in scheduler_config.json",)}
    try:
        if trained is None:
            found["schedule"] = {"name": SCHEDULES[name], "num_timesteps": count, **options}
            betas = make_beta_schedule(SCHEDULES[name], min(count, MAX_TIMESTEPS), **options)
        else:
            betas = np.asarray(trained, np.float64).reshape(-1)
        betas = rescale_zero_terminal_snr(betas) if found["zero_snr"] else betas
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has no schedule of betas: {error}") from error
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
