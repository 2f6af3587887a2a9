"""What the image hook shows: inputs, their diffusion, samples and how they came about."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import on_mesh, replicated
from diffusion_jax.diffusion import ddpm
from diffusion_jax.experiment.network.frames import FRAME, frame_of
from diffusion_jax.experiment.task import Drawing, Setting
from diffusion_jax.randomness import Stream, noise_like, sample_keys, stream_key
from diffusion_jax.train.ema import ema_params, has_ema
from diffusion_jax.train.first_stage.loss import Networks
from diffusion_jax.train.first_stage.pictures import autoencoder_images
from diffusion_jax.train.first_stage.step import averaged_params
from diffusion_jax.train.hooks.images import CLIPS
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree


def draw_pictures(
    drawing: Drawing,
    setting: Setting,
    frozen: PyTree,
    *,
    max_images: int,
    log_every_t: int = 200,
    class_names: tuple[str, ...] = (),
) -> Callable[[TrainState, Mapping[str, Any]], dict[str, Any]]:
    """Make log_images(state, batch) -> {key: images} for the first max_images of a host batch.

    Keys as latent-diffusion's log_images: inputs, reconstructions (of a first stage), conditioning
    (captions), diffusion_row (q(x_t | x_0) every log_every_t timesteps), samples and denoise_row
    (predicted x_0 along the way), drawn with the EMA weights. Of videos, inputs and samples have a
    row of frames for each clip, and the rows of several steps show the frame in the middle.
    """
    network, mesh, seed = drawing.network, setting.mesh, setting.seed
    inputs_of = [embedder.input_key for embedder in network.embedders.values()]

    # The host of every process reads the pictures: of several, none has all of a split array.
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def show(frozen: PyTree, images: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        latents = network.encode_mode(frozen, images)
        row = _diffusion_row(frozen["schedule"], latents, keys, log_every_t)
        if network.first_stage is None:
            return {"diffusion_row": _one_frame(row)}
        decode = functools.partial(network.decode, frozen)
        decoded = jnp.moveaxis(jax.lax.map(decode, jnp.moveaxis(row, 1, 0)), 0, 1)
        return {"reconstructions": decode(latents), "diffusion_row": _one_frame(decoded)}

    # Rows of the same number of pictures, whatever the sampler's number of steps.
    log_every = max(1, drawing.num_steps // 5)

    def log_images(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        batch = network.with_inputs(batch)
        count = min(max_images, len(batch["image"]))
        inputs = {key: np.asarray(batch[key][:count]) for key in inputs_of if key in batch}
        if network.num_frames is not None:
            inputs[FRAME] = np.asarray(frame_of(batch, network.frame_place)[:count])
        params = ema_params(state.opt_state) if has_ema(state.opt_state) else state.params
        samples = drawing.sample_fn(
            params,
            frozen,
            inputs,
            _keys(seed, Stream.LOGGED_SAMPLES, count),
            log_every=log_every,
            size=np.shape(batch["image"])[-3:-1],
        )
        assert samples.x_start_log is not None  # log_every asks for it
        images = np.asarray(batch["image"][:count])
        placed = (images, _keys(seed, Stream.LOGGED_DIFFUSION, count))
        log = {
            "inputs": images,
            **show(frozen, *put(placed, replicated(mesh))),
            "samples": samples.x,
            "denoise_row": _one_frame(jnp.moveaxis(samples.x_start_log, 0, 1)),
        }
        log = jax.device_get(log)
        if network.num_frames is not None:
            log[CLIPS] = log["samples"]
        captions = _captions(batch, max_images, class_names)
        return log if captions is None else log | {"conditioning": captions}

    return log_images


def reconstruct_pictures(
    networks: Networks,
    setting: Setting,
    frozen: PyTree,
    *,
    max_images: int,
    samples: bool = True,
    diff_boost_factor: float = 3.0,
    class_names: tuple[str, ...] = (),
) -> Callable[[TrainState, Mapping[str, Any]], dict[str, Any]]:
    """Make log_images(state, batch) of a first stage: see train.autoencoder_images.

    Of videos, each picture is a row of the frames of a clip, and the logits are of its middle one.
    samples: also decode latents from N(0, 1). diff_boost_factor: of the errors in diff_boost.
    """
    del frozen, class_names
    mesh, seed = setting.mesh, setting.seed

    # The host of every process reads the pictures: of several, none has all of a split array.
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def show(state: TrainState, image: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        averaged = averaged_params(state) if has_ema(state.opt_state) else None
        return autoencoder_images(
            networks,
            state.params,
            state.mutable,
            image,
            keys,
            averaged=averaged,
            samples=samples,
            diff_boost_factor=diff_boost_factor,
        )

    def log_images(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
        images = np.asarray(batch["image"][:max_images])
        frames = images.reshape(-1, *images.shape[-3:])
        placed = (frames, _keys(seed, Stream.LOGGED_SAMPLES, len(frames)))
        log = jax.device_get(show(state, *put(placed, replicated(mesh))))
        return log if images.ndim == 4 else _clips_of(log, images.shape[:2])

    return log_images


def _clips_of(log: Mapping[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Put pictures of frames together to clips, of a shape (clips, frames of a clip)."""
    clips = {name: rows.reshape(*shape, *rows.shape[1:]) for name, rows in log.items()}
    found = {
        name: rows if rows.ndim == 5 else rows[:, shape[1] // 2] for name, rows in clips.items()
    }
    moving = "reconstructions_ema" if "reconstructions_ema" in clips else "reconstructions"
    return {**found, CLIPS: clips[moving]}


def _one_frame(row: jax.Array) -> jax.Array:
    """Show of videos [b n t h w c] the frame in the middle; images stay [b n h w c]."""
    return row if row.ndim == 5 else row[:, :, row.shape[2] // 2]


def _keys(seed: int, stream: Stream, count: int) -> jax.Array:
    # The same noise at every step: the pictures of a run then show what training changed, not what
    # chance did.
    return sample_keys(stream_key(seed, stream), jnp.arange(count))


def _diffusion_row(
    schedule: Any, images: jax.Array, keys: jax.Array, log_every_t: int
) -> jax.Array:
    last = schedule.num_timesteps - 1
    timesteps = sorted({*range(0, last + 1, log_every_t), last})
    noise = noise_like(keys, images.shape[1:])
    rows = [ddpm.q_sample(schedule, images, jnp.full((len(images),), t), noise) for t in timesteps]
    return jnp.stack(rows, axis=1)


def _captions(
    batch: Mapping[str, Any], count: int, class_names: tuple[str, ...]
) -> list[str] | None:
    if "caption" in batch:
        return [str(caption) for caption in batch["caption"][:count]]
    if "label" in batch:
        labels = [int(label) for label in batch["label"][:count]]
        return [class_names[label] if class_names else str(label) for label in labels]
    return None
