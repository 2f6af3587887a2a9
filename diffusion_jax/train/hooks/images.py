"""Show what the model makes: often at first, then every so many steps."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.train.loop import Event, Hook, check_every
from diffusion_jax.train.pictures import caption_tiles, image_grid, to_pixels
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

# The key of what moves.
CLIPS = "clips"


def images(
    log_images: Callable[[PyTree, Any], Mapping[str, Any]],
    writer: Writer,
    *,
    split: str = "train",
    batch_frequency: int = 1000,
    max_images: int = 4,
    clamp: bool = True,
    increase_log_steps: bool = True,
    log_first_step: bool = False,
    batch: Any = None,
) -> Hook:
    """Make the hook: log_images(state, batch) -> {"samples": [n h w c] in [-1, 1], ...}.

    A value may also be [rows columns h w c], which keeps its rows (one sample each), or a list of
    captions, which are drawn as pictures and written as text too, one a line. The writer gets each
    as "{split}/{key}", one grid of four columns; image_writer makes
    images/{split}/{key}_gs-000100.png of it. The value of "clips", [n t h w c], is shown as one
    moving grid. With several processes, all draw the rows that process 0 has, and process 0 writes.

    Args:
        log_images: makes the pictures.
        writer: gets them.
        split: the first part of their names.
        batch_frequency: act at the multiples of this step.
        max_images: number of images of each kind.
        clamp: clip values outside of [-1, 1]; else they are scaled to fit.
        increase_log_steps: act at the powers of two up to batch_frequency too.
        log_first_step: act at step 1 too.
        batch: what to show instead of the batch of the step, for validation.

    Source: latent-diffusion and generative-models, ImageLogger.
    """
    check_every(batch_frequency, "batch_frequency")
    if max_images < 1:
        raise ValueError(f"max_images = {max_images} should be at least 1")

    def due(step: int) -> bool:
        early = increase_log_steps and step <= batch_frequency and step & (step - 1) == 0
        return early or step % batch_frequency == 0 or (log_first_step and step == 1)

    def act(event: Event) -> None:
        with jax.transfer_guard("allow"):  # sampling is allowed to be careless, it waits anyway
            own = event.batch if batch is None else batch
            shown = log_images(event.state, _of_process_0(own, max_images))
        grids, texts = {}, {}
        for key, value in shown.items():
            name = f"{split}/{key}"
            make = moving_picture if key == CLIPS else picture
            grids[name] = make(value, name, max_images=max_images, clamp=clamp)[None]
            if _is_text(value):
                texts[name] = "".join(f"{' '.join(str(v).split())}\n" for v in value[:max_images])
        writer.write_images(event.step, grids)
        if texts:
            writer.write_texts(event.step, texts)

    return Hook(due, act)


def _of_process_0(batch: Any, max_images: int) -> Any:
    """Give every process the first rows that process 0 has.

    A program over all devices needs the same inputs everywhere.
    """
    if jax.process_count() == 1:
        return batch
    first = {name: np.asarray(rows)[:max_images] for name, rows in batch.items()}
    packed = np.frombuffer(pickle.dumps(first), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(packed))))
    own = packed if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes())


def moving_picture(
    value: np.ndarray, name: str, *, max_images: int, clamp: bool = True
) -> np.ndarray:
    """Make uint8 grids [t h w c] of the clips [n t h w c], one for each time."""
    times = np.asarray(value)[:max_images].swapaxes(0, 1)
    return np.stack([picture(time, name, max_images=max_images, clamp=clamp) for time in times])


def picture(
    value: np.ndarray | Sequence[str], name: str, *, max_images: int, clamp: bool = True
) -> np.ndarray:
    """Make one uint8 grid [h w c] of images or captions; ValueError for anything else."""
    array = np.asarray(value)
    if _is_text(value):
        array = caption_tiles([str(caption) for caption in array[:max_images]])
    try:
        return image_grid(to_pixels(array[:max_images], clamp=clamp))
    except ValueError as error:
        raise ValueError(f"log_images cannot show {name!r}: {error}") from error


def _is_text(value: np.ndarray | Sequence[str]) -> bool:
    return np.asarray(value).dtype.kind in "UO"
