"""Released files without a config: what they are, and which shipped config describes them."""

import math
import os
import pathlib
from collections.abc import Sequence

import ml_collections

from diffusion_jax.convert.weights.claims import Claims, read_claims
from diffusion_jax.convert.weights.identify import describe_weights, list_networks
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.files.claims import overrides_of
from diffusion_jax.runs.comparison import override_later
from diffusion_jax.runs.files.native import About, find_about
from diffusion_jax.runs.folder import has_run

# A family of UNets -> the shipped configs that describe it, by what the network predicts; None is
# for files that do not say it.
CONFIGS: dict[str, dict[str | None, tuple[str, ...]]] = {
    "v1": {None: ("sd15",)},
    "v1_inpainting": {None: ("sd15:inpaint",)},
    "v1_edit": {None: ("sd15:edit",)},
    "v2_inpainting": {None: ("sd21:inpaint",)},
    "v2": {"eps": ("sd21",), "v": ("sd21:768v",), None: ("sd21", "sd21:768v")},
    "xl_base": {None: ("sdxl",)},
    "xl_refiner": {None: ("sdxl_refiner",)},
    "svd": {None: ("svd",)},
    "sv3d_u": {None: ("sv3d",)},
    "sv3d_p": {None: ("sv3d:p",)},
    "sv4d": {None: ("sv4d",)},
    "sv4d2": {None: ("sv4d:2", "sv4d:2_8views")},
}
_NAMES_SHOWN = 10
_SAID = "prediction zero_snr sigma_min sigma_max sigma_data scale_factor spacing".split()


def describe_file(path: str | os.PathLike) -> list[str]:
    """Say what a released file or folder is: networks, sizes, dtypes, what it predicts, its config.

    Raises ValueError for a run of this program, and what open_weights raises.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if has_run(path):
        raise ValueError(f"{path} is a run of this program; `report` says what it did")
    about = find_about(path)
    if about is not None:
        return _describe_native(path, about)
    networks = list_networks(path)
    sizes = [f"{held.count:,} numbers ({', '.join(held.dtypes)})" for held in networks]
    lines = describe_weights(path)
    lines[: len(networks)] = [
        f"{held.words}: {size}" for held, size in zip(networks, sizes, strict=True)
    ]
    if not networks:
        return lines
    claims = read_claims(path)
    claimed = [(name, getattr(claims, name)) for name in _SAID]
    says = [f"{name} = {value}" for name, value in claimed if value is not None]
    if claims.alphas_cumprod is not None:
        last = claims.alphas_cumprod[-1]
        says.append(f"{len(claims.alphas_cumprod)} timesteps, alphas_cumprod down to {last:.3g}")
    lines.append(f"it says of itself: {', '.join(says) or 'nothing'}")
    fitting = _fitting(path, claims)
    if len(fitting) == 1:
        agree = _agreeing(path, fitting[0], ())
        return [*lines, f"config: {' '.join([f'--config={fitting[0]}', *agree])}"]
    return [*lines, f"config: {' or '.join(fitting) or 'none of the shipped ones'}"]


def _describe_native(path: pathlib.Path, about: About) -> list[str]:
    tensors = open_weights(path).tensors
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    config, names = about.config, about.class_names
    of = "" if about.step is None else f" of step {about.step}"
    beside = ", its averages beside them" if any(n.startswith("ema/") for n in tensors) else ""
    lines = [
        f"a native file of this program: {config.model.name}, {count:,} numbers ({dtypes})",
        f"weights: {about.weights}{of}{beside}",
        f"trained on: {config.data.source.name}",
    ]
    if names:
        more = ", ..." if len(names) > _NAMES_SHOWN else ""
        lines.append(f"classes: {len(names)} ({', '.join(names[:_NAMES_SHOWN])}{more})")
    return [*lines, "config: inside the file; no --config is needed"]


def config_for(
    path: str | os.PathLike, config: str | None = None, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """Load the config that describes a released file: the given one, or a shipped one that fits.

    A native file has its config inside. A shipped one follows what the file says of itself;
    overrides come last.
    Raises ValueError when no shipped config, or more than one, describes the file, and for
    overrides that would change the model of a native file.
    """
    if config is not None:
        return load_config(config, overrides)
    about = find_about(path)
    if about is not None:
        return override_later(about.config, overrides, str(path))
    fitting = _fitting(path, read_claims(path))
    if len(fitting) != 1:
        held = ", ".join(describe_weights(path))
        which = f"{' and '.join(fitting)} fit it" if fitting else "no shipped config describes it"
        raise ValueError(f"{path} needs --config=, because {which}: it holds {held}")
    return load_config(fitting[0], [*_agreeing(path, fitting[0], overrides), *overrides])


def _fitting(path: str | os.PathLike, claims: Claims) -> tuple[str, ...]:
    """Name the shipped configs that describe the UNet of a file."""
    families = [held.family.name for held in list_networks(path) if held.family is not None]
    if len(families) != 1 or families[0] not in CONFIGS:
        return ()
    configs = CONFIGS[families[0]]
    return configs[claims.prediction if claims.prediction in configs else None]


def _agreeing(path: str | os.PathLike, config: str, overrides: Sequence[str]) -> list[str]:
    """Find the overrides with which a config says what the file says of itself."""
    experiment = make_experiment(load_config(config, overrides))
    return overrides_of(experiment.task.contradictions(path))
