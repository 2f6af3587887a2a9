"""The loss of a denoiser at each of several noise levels, on noise that is always the same."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data.batches import Batches
from diffusion_jax.devices.arrays import put, shard_batch
from diffusion_jax.devices.mesh import on_mesh, replicated
from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.losses import sample_means
from diffusion_jax.experiment.config.binding import bind_section
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.objective import WEIGHTING
from diffusion_jax.experiment.scoring import Levels
from diffusion_jax.metrics.intervals import Interval, change, interval
from diffusion_jax.randomness import Stream, fold_in_all, noise_like, sample_keys, stream_key
from diffusion_jax.runs.measuring.likelihood import build_bits, has_likelihood
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree

# The name of the bits per dimension among the scalars.
BITS = "levels/bits_per_dim"
# params -> losses [n levels] of the same images with the same noise
LevelLosses = Callable[[PyTree], np.ndarray]


def build_level_losses(
    experiment: Experiment, frozen: PyTree, batches: Batches, options: Levels
) -> tuple[np.ndarray, LevelLosses]:
    """Find the noise levels [l], ascending, and make losses(params) -> [n l] in float32.

    The loss is the error of the denoised image, weighed so that it is the plain error of what the
    network predicts. The noise of an image depends on its number and the level alone, not on the
    step, the weights, the batch size or the devices: two calls differ by the weights alone.
    Raises ValueError for fewer than 1 level or 2 images.
    """
    for name, least in (("num_levels", 1), ("num_images", 2)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"{name} = {value} should be at least {least}")
    drawing, mesh = experiment.drawing, experiment.mesh
    network, noise = drawing.network, drawing.noise
    sigmas = noise_levels(noise, options.num_levels)
    natural = noise.natural_weighting or {"name": "unit"}
    weighting = bind_section(WEIGHTING, natural).make()
    root = stream_key(experiment.seed, Stream.LEVELS)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def run(params: PyTree, frozen: PyTree, batch: Any, ids: jax.Array, sigmas: jax.Array) -> Any:
        params, frozen = drawing.whole(params, frozen)
        x = network.encode_mode(frozen, batch["image"])
        keys = sample_keys(root, jnp.maximum(ids, 0))
        batch = network.with_conditioning_frame(batch, keys)
        conditioning = network.embed(params, frozen, batch)
        denoise = noise.denoise(lambda *given: network.apply(params, *given), frozen)

        def at(numbered: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, level = numbered
            sigma = jnp.full(x.shape[:1], level)
            noisy = x + expand(sigma, x) * noise_like(fold_in_all(keys, number), x.shape[1:])
            errors = sample_means(jnp.square(denoise(noisy, sigma, conditioning) - x))
            return weighting(sigma) * errors

        numbers = jnp.arange(len(sigmas), dtype=jnp.uint32)
        return jax.lax.map(at, (numbers, sigmas)).T, ids

    levels = put(jnp.asarray(sigmas, jnp.float32), replicated(mesh))

    def losses(params: PyTree) -> np.ndarray:
        found: list[np.ndarray] = []
        for batch in batches.iterate(0):
            ids = batch["index"].astype(np.int32)  # -1 for padding
            placed = shard_batch(mesh, {"id": ids})["id"]
            rows, ids = jax.device_get(
                run(params, frozen, experiment.to_devices(batch), placed, levels)
            )
            found.append(rows[ids >= 0])
            if sum(map(len, found)) >= options.num_images:
                break
        return np.concatenate(found)[: options.num_images]

    return sigmas, losses


def noise_levels(noise: Noise, count: int) -> np.ndarray:
    """Choose `count` finite noise levels, ascending: evenly spaced in a denoiser's table.

    A continuous denoiser has no table; its levels are those that sampling visits.
    """
    if noise.sigmas is None:
        return np.asarray(noise.grid(count)[:-1][::-1], np.float64)
    table = np.asarray(noise.sigmas, np.float64)
    table = table[np.isfinite(table)]
    return table[np.unique(np.round(np.linspace(0, len(table) - 1, count)).astype(int))]


def build_evaluate_levels(
    experiment: Experiment, frozen: PyTree, batches: Batches, options: Levels
) -> Callable[[TrainState], dict[str, float]]:
    """Make evaluate(state) -> scalars by noise level, raw and with averages.

    "levels/03" is the mean loss at level 3, "levels/03_ci" the half width of its 95 % confidence
    interval, "levels/03_change" the mean change since the call before on the same images and noise,
    with "levels/03_change_ci"; "_ema" follows each name for the averages. "levels/03_sigma" is the
    level itself. With options.bits_images, "levels/bits_per_dim" and its companions are bounds on
    the bits per dimension.

    Raises ValueError for bits of a model that has none, or of a single image.
    """
    sigmas, losses = build_level_losses(experiment, frozen, batches, options)
    names = [f"levels/{i:02d}" for i in range(len(sigmas))]
    measures = [(names, losses)]
    if options.bits_images:
        _check_bits(experiment, options.bits_images)
        bits = build_bits(experiment, frozen, batches, options.bits_images)
        measures.append(([BITS], lambda params: bits(params)[:, None]))
    before: dict[tuple[int, str], np.ndarray] = {}

    def evaluate(state: TrainState) -> dict[str, float]:
        found = {f"{name}_sigma": float(s) for name, s in zip(names, sigmas, strict=True)}
        weights = {"": state.params}
        if has_ema(state.opt_state):
            weights["_ema"] = experiment.task.averaged(state)
        for end, params in weights.items():
            for number, (own_names, measure) in enumerate(measures):
                own = measure(params)
                found |= _named(interval(own), own_names, "", end)
                if (number, end) in before:
                    found |= _named(change(before[number, end], own), own_names, "_change", end)
                before[number, end] = own
        return found

    return evaluate


def _check_bits(experiment: Experiment, count: int) -> None:
    if count < 2:
        raise ValueError(f"bits_images = {count} should be 0, or at least 2 for an interval")
    if not has_likelihood(experiment):
        raise ValueError(
            f"bits_images = {count} should be 0: bits per dimension are defined for models of "
            "pixels whose network knows the timesteps of the schedule"
        )


def _named(found: Interval, names: Sequence[str], what: str, end: str) -> dict[str, float]:
    named: dict[str, float] = {}
    for name, mean, half in zip(names, *found, strict=True):
        named[f"{name}{what}{end}"] = float(mean)
        named[f"{name}{what}_ci{end}"] = float(half)
    return named


def level_lines(found: Mapping[str, float]) -> list[str]:
    """Lay out the scalars of build_evaluate_levels as a table, one line a noise level."""
    levels = [name.removesuffix("_sigma") for name in found if name.endswith("_sigma")]
    lines = [_line(found, at, f"sigma {found[f'{at}_sigma']:<9.4g}", "loss") for at in levels]
    if BITS in found:
        lines.append(_line(found, BITS, " " * len("sigma 123456789"), "bits per dimension"))
    return lines


def _line(found: Mapping[str, float], at: str, start: str, measure: str) -> str:
    parts = [start]
    for end, label in (("", ""), ("_ema", " ema")):
        for what, form in (("", ".4g"), ("_change", "+.2g")):
            if f"{at}{what}{end}" in found:
                mean, half = found[f"{at}{what}{end}"], found[f"{at}{what}_ci{end}"]
                parts.append(f"{what.strip('_') or measure}{label} {mean:{form}} ± {half:.2g}")
    return "  ".join(parts)
