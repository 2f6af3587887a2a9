"""The `schedule`, `denoiser` and `discretization` sections -> how noise enters and what the network
says about it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.preconditioning import SCALINGS, Scaling, denoiser
from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS, from_schedule, sigma_table
from diffusion_jax.diffusion.schedule import BETA_SCHEDULES, Schedule, make_schedule
from diffusion_jax.experiment.binding import (
    ConfigError,
    bind,
    check_type,
    known_sections,
    options,
    row,
    value_of,
)
from diffusion_jax.types import PyTree

DENOISERS = ("discrete", "continuous")
NATURAL_WEIGHTINGS: dict[str, dict[str, Any]] = {
    "eps": {"name": "eps"},
    "v": {"name": "v"},
    "v_edm": {"name": "v"},
    "x0": {"name": "unit"},
    "edm": {"name": "edm"},
}
# What a config that leaves the section out means: a network trained on the schedule's timesteps.
DEFAULT_DENOISER = {"name": "discrete"}


class Noise(NamedTuple):
    """The noise levels of a config.

    on_timesteps: whether the network predicts the schedule's parameterization at its timesteps, as
    DDPM, DDIM and PLMS need. sigmas: the table of a discrete denoiser, float32 ascending, made by
    `levels`; both None when it is continuous. grid: number of steps -> noise levels of sampling,
    float64 descending to 0. natural_weighting: the section of a weighting with which the loss on
    x_0 is the plain error of what the network predicts.
    """

    schedule: Schedule
    parameterization: str
    scaling: Scaling
    levels: Callable[[int], np.ndarray] | None
    sigmas: Array | None
    quantize_c_noise: bool
    on_timesteps: bool
    grid: Callable[[int], np.ndarray]
    natural_weighting: Mapping[str, Any]

    def constants(self) -> dict[str, Any]:
        """Give the arrays that training and sampling read: the schedule, and the table if any."""
        constants: dict[str, Any] = {"schedule": self.schedule}
        if self.sigmas is not None:
            constants["sigmas"] = self.sigmas
        return constants

    def denoise(self, apply: Callable[..., Array], frozen: PyTree) -> Callable[..., Array]:
        """Make D(x, sigma, conditioning) -> x_0 of a network apply(x, c_noise, conditioning)."""
        table = frozen["sigmas"] if "sigmas" in frozen else None
        return denoiser(apply, self.scaling, table, quantize_c_noise=self.quantize_c_noise)


def build_noise(
    schedule_section: Mapping[str, Any],
    denoiser_section: Mapping[str, Any] | None,
    grid_section: Mapping[str, Any] | None,
) -> Noise:
    """Build the noise levels of a config; ConfigError for an option that is wrong."""
    row(BETA_SCHEDULES, schedule_section, "config.schedule")
    keywords = bind(make_schedule, schedule_section, "config.schedule", given=("name",))
    parameterization = value_of(make_schedule, keywords, "parameterization")
    schedule = make_schedule(schedule_section["name"], **keywords)
    section: dict[str, Any] = {"quantize_c_noise": True}
    section |= DEFAULT_DENOISER if denoiser_section is None else denoiser_section
    path = "config.denoiser"
    known_sections(section, ("name", "scaling", "discretization", "quantize_c_noise"), path)
    kind = row({name: name for name in DENOISERS}, section, path)
    scaling_section = section["scaling"] if "scaling" in section else {"name": parameterization}
    factory = row(SCALINGS, scaling_section, f"{path}.scaling")
    scaling = factory(**bind(factory, scaling_section, f"{path}.scaling"))
    if kind == "continuous" and "discretization" in section:
        raise ConfigError(f"{path}.discretization is the table of a discrete denoiser; drop it")
    levels, num_idx = _levels(section, schedule) if kind == "discrete" else (None, 0)
    quantize = check_type(section["quantize_c_noise"], bool, f"{path}.quantize_c_noise")
    return Noise(
        schedule,
        parameterization,
        scaling,
        levels,
        None if levels is None else sigma_table(levels, num_idx),
        quantize,
        kind == "discrete"
        and quantize
        and "discretization" not in section
        and scaling_section == {"name": parameterization},
        _grid(grid_section, kind, schedule),
        NATURAL_WEIGHTINGS[scaling_section["name"]] | options(scaling_section),
    )


def _levels(
    section: Mapping[str, Any], schedule: Schedule
) -> tuple[Callable[[int], np.ndarray], int]:
    if "discretization" not in section:
        return functools.partial(from_schedule, schedule), schedule.num_timesteps
    own, path = dict(section["discretization"]), "config.denoiser.discretization"
    num_idx = check_type(own.pop("num_idx") if "num_idx" in own else 1000, int, f"{path}.num_idx")
    return bind_levels(own, path), num_idx


def bind_levels(section: Mapping[str, Any], path: str) -> Callable[[int], np.ndarray]:
    """Bind a section that names a discretization: num_steps -> sigmas, descending to 0."""
    factory = row(DISCRETIZATIONS, section, path)
    return functools.partial(factory, **bind(factory, section, path, given=("num_steps",)))


def _grid(
    section: Mapping[str, Any] | None, kind: str, schedule: Schedule
) -> Callable[[int], np.ndarray]:
    if section is None:
        section = {"name": "schedule"} if kind == "discrete" else {"name": "edm"}
    path = "config.discretization"
    if "name" in section and section["name"] == "schedule":
        bind(from_schedule, section, path, given=("schedule", "num_steps"))
        return functools.partial(from_schedule, schedule)
    return bind_levels(section, path)
