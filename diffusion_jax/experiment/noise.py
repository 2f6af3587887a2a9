"""The `schedule`, `denoiser` and `discretization` sections -> noise levels and predictions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.preconditioning import SCALINGS, Scaling, denoiser
from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS, from_schedule, sigma_table
from diffusion_jax.diffusion.schedule import BETA_SCHEDULES, Schedule, make_schedule
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section, value_of
from diffusion_jax.experiment.config.options import DenoiserOptions, TableOptions
from diffusion_jax.types import PyTree

SCHEDULE = Section(
    "config.schedule",
    "The schedule of the forward process, and what the network predicts on its timesteps.",
    table=dict.fromkeys(BETA_SCHEDULES, make_schedule),
    given=("name",),
    default="linear",
)
DENOISER = Section(
    "config.denoiser",
    "The denoiser D(x, sigma) around the network: on a table of noise levels, or on all.",
    table=dict.fromkeys(("discrete", "continuous"), DenoiserOptions),
    default="discrete",
)
SCALING = Section(
    "config.denoiser.scaling",
    "c_skip, c_out, c_in and c_noise; by default what the schedule's parameterization says.",
    table=SCALINGS,
    own=(),
)
TABLE = Section(
    "config.denoiser.discretization",
    "The noise levels that a discrete denoiser knows; by default the schedule's.",
    ((TableOptions, ()),),
    DISCRETIZATIONS,
    ("num_steps",),
    own=("num_steps",),
)
GRID = Section(
    "config.discretization",
    "The noise levels of sampling; by default the schedule's, or what suits the scaling.",
    table=DISCRETIZATIONS | {"schedule": from_schedule},
    given=("schedule", "num_steps"),
    own=("num_steps",),
)
# Scaling -> the weighting with which the loss on x_0 is the plain error of what is predicted.
NATURAL_WEIGHTINGS = {
    "eps": "eps",
    "v": "v",
    "v_edm": "v",
    "x0": "unit",
    "edm": "edm",
    "flow": "flow",
}


class Noise(NamedTuple):
    """The noise levels of a config.

    on_timesteps: whether the network predicts the schedule's parameterization at its timesteps, as
    DDPM, DDIM and PLMS need. sigmas: the table of a discrete denoiser, float32 ascending, made by
    `levels`; both None when it is continuous. grid: number of steps -> noise levels of sampling,
    float64 descending to 0. natural_weighting: the section of a weighting with which the loss on
    x_0 is the plain error of what the network predicts; None for a scaling of the user's own.
    natural_sampling: the row of sigma_sampling that training draws noise levels from by default.
    schedule_options: what the config says about the schedule, with its name. around: the entry of
    the conditioning that is denoised around, see preconditioning.denoiser.
    """

    schedule: Schedule
    parameterization: str
    scaling: Scaling
    levels: Callable[[int], np.ndarray] | None
    sigmas: Array | None
    quantize_c_noise: bool
    on_timesteps: bool
    grid: Callable[[int], np.ndarray]
    natural_weighting: Mapping[str, Any] | None
    natural_sampling: str
    schedule_options: Mapping[str, Any]
    around: str | None = None

    def constants(self) -> dict[str, Any]:
        """Return the arrays that training and sampling read: the schedule, and a table if any."""
        constants: dict[str, Any] = {"schedule": self.schedule}
        if self.sigmas is not None:
            constants["sigmas"] = self.sigmas
        return constants

    def denoise(self, apply: Callable[..., Array], frozen: PyTree) -> Callable[..., Array]:
        """Make D(x, sigma, conditioning) -> x_0 of a network apply(x, c_noise, conditioning)."""
        table = frozen["sigmas"] if "sigmas" in frozen else None
        how = {"quantize_c_noise": self.quantize_c_noise, "around": self.around}
        return denoiser(apply, self.scaling, table, **how)


def build_noise(
    schedule_section: Mapping[str, Any] | None,
    denoiser_section: Mapping[str, Any] | None,
    grid_section: Mapping[str, Any] | None,
) -> Noise:
    """Build the noise levels of a config; ConfigError for an option that is wrong."""
    beta = bind_section(SCHEDULE, schedule_section)
    parameterization = value_of(make_schedule, beta.keywords, "parameterization")
    schedule = beta.make(beta.name)
    bound = bind_section(DENOISER, denoiser_section)
    options = DenoiserOptions(**bound.keywords)
    named = {"name": parameterization} if options.scaling is None else options.scaling
    scaling = bind_section(SCALING, named)
    discrete, own_table = bound.name == "discrete", options.discretization is not None
    if own_table and not discrete:
        raise ConfigError(f"{TABLE.path} is the table of a discrete denoiser; drop it")
    levels, num_idx = _levels(options, schedule) if discrete else (None, 0)
    on_schedule = discrete and not own_table and scaling.name == parameterization
    natural = None
    if scaling.name in NATURAL_WEIGHTINGS:
        shared = {name: value for name, value in scaling.keywords.items() if name != "time_scale"}
        natural = {"name": NATURAL_WEIGHTINGS[scaling.name], **shared}
    return Noise(
        schedule,
        parameterization,
        scaling.make(),
        levels,
        None if levels is None else sigma_table(levels, num_idx),
        options.quantize_c_noise,
        on_schedule and options.quantize_c_noise and options.around is None,
        _grid(grid_section, _natural_grid(discrete, scaling.name), schedule),
        natural,
        _natural_sampling(discrete, scaling.name),
        {"name": beta.name, **beta.keywords},
        options.around,
    )


def bind_levels(spec: Section, section: Mapping[str, Any]) -> Callable[[int], np.ndarray]:
    """Bind a section that names a discretization: num_steps -> sigmas, descending to 0."""
    bound = bind_section(spec, section)
    return functools.partial(bound.factory, **bound.keywords)


def _levels(
    options: DenoiserOptions, schedule: Schedule
) -> tuple[Callable[[int], np.ndarray], int]:
    if options.discretization is None:
        return functools.partial(from_schedule, schedule), schedule.num_timesteps
    bound = bind_section(TABLE, options.discretization)
    return functools.partial(bound.factory, **bound.keywords), TableOptions(**bound.own[0]).num_idx


def _natural_grid(discrete: bool, scaling: str) -> str:
    if discrete:
        return "schedule"
    return scaling if scaling in ("flow", "consistency") else "edm"


def _natural_sampling(discrete: bool, scaling: str) -> str:
    if discrete:
        return "discrete"
    return "logit_normal" if scaling == "flow" else "lognormal"


def _grid(
    section: Mapping[str, Any] | None, default: str, schedule: Schedule
) -> Callable[[int], np.ndarray]:
    bound = bind_section(GRID, {"name": default} if section is None else section)
    if bound.factory is from_schedule:
        return functools.partial(from_schedule, schedule)
    return functools.partial(bound.factory, **bound.keywords)
