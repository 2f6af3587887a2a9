"""Which timesteps of a schedule a sampler visits: a table of names."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from diffusion_jax.diffusion.schedule import check_choice

# The rows of DISCRETIZATIONS, as the type of an option: a wrong name is found before anything runs.
Discretize = Literal["uniform", "uniform_ldm", "quad", "leading", "trailing", "linspace"]


def visited_timesteps(
    num_timesteps: int, num_steps: int, discretize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Choose num_steps of T timesteps, and where the step from each of them ends.

    Returns: (visited, previous), int32 [num_steps] (uniform_ldm may have more), smallest first.
      visited increases strictly; previous[i] is visited[i - 1], and previous[0] is 0 or, for the
      clean image, -1.
    discretize:
      uniform: floor(i T / S) + 1, which is uniform_ldm where S divides T; ends at timestep 0. For
        S = T it visits 0 ... T - 1 and ends clean.
      uniform_ldm: i floor(T / S) + 1, as many as are below T, the "uniform" of latent-diffusion:
        31 timesteps for S = 30 of 1000; ends at timestep 0. ValueError where that leaves the
        schedule, as for S = 300.
      quad: squares of an even grid up to 0.8 T, plus 1, as upstream; ends at timestep 0. Where
        upstream would visit a timestep twice, the next free one is taken.
      leading: i floor(T / S), the even grid from 0; ends clean (diffusers).
      trailing: the even grid of spacing T / S that ends at T - 1; ends clean (Lin et al. 2023).
      linspace: S points from 0 to T - 1, both included, rounded; one step is T - 1; ends clean.

    Raises ValueError for num_steps outside [1, T] and for an unknown name.
    """
    check_choice("discretize", discretize, tuple(DISCRETIZATIONS))
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps = {num_steps!r} should lie in [1, {num_timesteps}], "
            "the timesteps of the schedule"
        )
    if num_steps == num_timesteps and discretize != "uniform_ldm":
        visited = np.arange(num_timesteps, dtype=np.int32)
    else:
        visited = DISCRETIZATIONS[discretize](num_timesteps, num_steps).astype(np.int32)
    if visited[-1] >= num_timesteps:
        raise ValueError(
            f"num_steps = {num_steps!r} makes uniform_ldm visit timestep {visited[-1]} of "
            f"{num_timesteps}, which does not exist; take another number, or uniform"
        )
    stops_short = discretize in ("uniform", "uniform_ldm", "quad") and visited[0] > 0
    previous = np.concatenate([[0 if stops_short else -1], visited[:-1]]).astype(np.int32)
    return visited, previous


def _uniform(T: int, S: int) -> np.ndarray:
    return np.arange(S) * T // S + 1


def _uniform_ldm(T: int, S: int) -> np.ndarray:
    return np.arange(0, T, T // S) + 1


def _quad(T: int, S: int) -> np.ndarray:
    visited = (np.linspace(0.0, np.sqrt(0.8 * T), S) ** 2).astype(np.int64) + 1
    offset = np.arange(S)
    # Push repeated timesteps up to the next free one, and keep room for those above.
    return np.minimum(np.maximum.accumulate(visited - offset) + offset, T - S + offset)


def _leading(T: int, S: int) -> np.ndarray:
    return np.arange(S) * (T // S)


def _trailing(T: int, S: int) -> np.ndarray:
    return np.round(np.arange(1, S + 1) * (T / S)) - 1


def _linspace(T: int, S: int) -> np.ndarray:
    return np.round(np.linspace(T - 1, 0, S))[::-1]


# (num_timesteps, num_steps) -> timesteps, smallest first
DISCRETIZATIONS: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "uniform_ldm": _uniform_ldm,
    "quad": _quad,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
