"""PLMS: DDIM's step along a noise prediction that remembers the steps before (order up to 4)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.guidance import check_norm_threshold, norm_threshold
from diffusion_jax.diffusion.samplers.by_timestep import Discretize, visited_timesteps
from diffusion_jax.diffusion.samplers.driver import Sampler
from diffusion_jax.diffusion.schedule import Schedule, at_or_clean, check_choice

__all__ = ["plms"]

# Adams-Bashforth on an even grid: weights of this prediction, of the one before, ..., by how many
# of those before are known. With none, the first step looks ahead instead.
_WEIGHTS = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [3 / 2, -1 / 2, 0.0, 0.0],
        [23 / 12, -16 / 12, 5 / 12, 0.0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ],
    np.float32,
)


class PLMSStep(NamedTuple):
    """One step from timestep t: x_prev = signal_prev x_0 + sigma_prev eps, each [num_steps].

    t_ahead is where the first step looks ahead: the timestep of the next step, and in the last
    step t itself.
    """

    t: Any
    t_ahead: Any
    signal_prev: Any
    sigma_prev: Any


def plms(
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    discretize: Discretize = "uniform",
    parameterization: Literal["eps", "x0", "v"] = "eps",
    norm_limit: float | None = None,
) -> Sampler:
    """Make the PLMS sampler: DDIM's step with eps' = (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24.

    eps_k is the prediction k steps before; while fewer are known the order is lower, and the first
    step (also of a segment) takes the mean of eps here and after a trial step: num_steps + 1
    network evaluations in all.

    eta: 0, the method is deterministic; there so that a config of the original loads.
    discretize: which timesteps are visited and where the last step ends, see visited_timesteps.
    norm_limit: hold the root mean square of the predicted x_0 below it, see
      guidance.norm_threshold (Stable Diffusion 2's dynamic_threshold); None leaves x_0 alone.

    Raises ValueError for eta other than 0, num_steps outside [1, T], norm_limit that is not
    positive, unknown names, and (unless the schedule is traced) where the first timestep visited
    has abar = 0: x_0 does not follow from eps there.
    Source: Liu et al. 2022 (PNDM), section 3.3; latent-diffusion, PLMSSampler.
    """
    if eta != 0.0:
        raise ValueError(f"eta = {eta!r} should be 0: PLMS is deterministic; ddim has an eta")
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    check_norm_threshold("norm_limit", norm_limit)
    visited, previous = visited_timesteps(schedule.num_timesteps, num_steps, discretize)
    visited, previous = visited[::-1], previous[::-1]
    _check_signal(schedule, int(visited[0]))
    ahead = np.append(visited[1:], visited[-1])
    steps = PLMSStep(jnp.asarray(visited), jnp.asarray(ahead), *at_or_clean(schedule, previous))

    def noise_at(predict, x: Array, t: Array) -> Array:
        t = jnp.full(x.shape[:1], t)
        noise = ddpm.predict_noise(schedule, predict(x, t), x, t, parameterization)
        return noise.astype(x.dtype)

    def move(x: Array, noise: Array, now: PLMSStep) -> tuple[Array, Array]:
        t = jnp.full(x.shape[:1], now.t)
        x_start = ddpm.predict_start_from_noise(schedule, x, t, noise)
        if norm_limit is not None:
            x_start = norm_threshold(x_start, norm_limit)
        return now.signal_prev * x_start + now.sigma_prev * noise, x_start

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((4, *x.shape), x.dtype)

    def step(predict, x, memory, now: PLMSStep, keys):
        known, noises = memory
        noise = noise_at(predict, x, now.t)
        noises = jnp.concatenate([noise[None], noises[:-1]])

        def look_ahead():
            trial, _ = move(x, noise, now)
            return 0.5 * (noise + noise_at(predict, trial, now.t_ahead))

        def look_back():
            return jnp.tensordot(jnp.asarray(_WEIGHTS)[known], noises, 1)

        x, x_start = move(x, jax.lax.cond(known == 0, look_ahead, look_back), now)
        return x, (jnp.minimum(known + 1, 3), noises), x_start

    return Sampler(init, step, steps, add_noise=ddpm.diffuse(schedule))


def _check_signal(schedule: Schedule, t: int) -> None:
    signal = schedule.sqrt_alphas_cumprod
    if not isinstance(signal, Tracer) and float(signal[t]) == 0.0:
        raise ValueError(
            f"abar is 0 at timestep {t}, the first of plms, which goes from eps to x_0; take "
            "another discretize (uniform, leading), or ddim"
        )
