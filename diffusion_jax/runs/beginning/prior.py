"""Prior preservation: images that a model draws before it is trained, and goes on learning."""

import itertools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data.batches import Batches
from diffusion_jax.data.mixing import CaptionedFiles, mixed
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.experiment.config.options import PriorOptions
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.prior import rows_of
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.runs.inputs.conditions import encode_conditions
from diffusion_jax.train.pictures import png_bytes, to_pixels
from diffusion_jax.types import PyTree

FOLDER = "prior"
# What the images of a folder were drawn of.
ABOUT = "prior.json"
# Options of batches that are about the user's records.
_OF_THE_USER = (
    *("tags", "caption", "image_key", "label_key", "caption_key"),
    *("repeats_key", "weight_key"),
)
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def with_prior(
    experiment: Experiment,
    batches: Batches,
    params: PyTree,
    frozen: PyTree,
    workdir: pathlib.Path,
    *,
    home: pathlib.Path,
    begins: bool,
) -> Batches:
    """Mix the batches of training with images that the model drew; without `prior` do nothing.

    They lie in the folder that config.prior names, or in `prior` in workdir. What is missing of
    them is drawn now, with params, which should be the ones that training begins with.
    home: the run whose images are copied, where a run was forked from it. begins: whether params
    are such parameters.
    Raises ValueError for a folder of another prompt, and when images are missing later on.
    """
    options = experiment.prior
    if options is None:
        return batches
    folder = pathlib.Path(os.path.expanduser(options.folder or workdir / FOLDER))
    if options.folder is None and home != workdir and jax.process_index() == 0:
        shutil.copytree(home / FOLDER, folder, dirs_exist_ok=True)
    missing = _missing(folder, options)
    if missing and not begins:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {options.num_images} images of config.prior, which "
            "were drawn before training: put them back, or begin a new run"
        )
    if missing:
        draw_images(experiment, params, frozen, folder, missing)
    files = _files(folder)[: options.num_images]
    data = experiment.data
    data = data._replace(batch_options={**data.batch_options, **dict.fromkeys(_OF_THE_USER)})
    others = data.train_batches(
        CaptionedFiles(files, options.prompt),
        batch_size=rows_of(options, experiment.training.batch_size),
        seed=experiment.seed,
        finish=experiment.task.with_inputs,
    )
    return mixed(batches, others, options.weight)


def draw_images(
    experiment: Experiment,
    params: PyTree,
    frozen: PyTree,
    folder: pathlib.Path,
    numbers: list[int],
) -> None:
    """Draw the images of these numbers as PNG files; image i is a function of (seed, i).

    Each call of the devices writes its images, so that a second start goes on where the first one
    ended.
    """
    options = experiment.prior
    assert options is not None
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / ABOUT) as partial:
            partial.write_text(json.dumps({"prompt": options.prompt}))
    rows = experiment.round_up(options.batch_size)
    size = experiment.data.image_shape[:2]
    inputs, _ = encode_conditions(experiment.network, options.prompt, rows, tuple, size)
    root = stream_key(experiment.seed, Stream.PRIOR_IMAGES)
    chunks = [numbers[start : start + rows] for start in range(0, len(numbers), rows)]
    total = len(numbers)
    for chunk in log_progress(chunks, total, f"drawing images of {options.prompt!r}", size=len):
        padded = np.array([*chunk, *[chunk[-1]] * (rows - len(chunk))])
        samples = experiment.sample_fn(
            params,
            frozen,
            inputs,
            sample_keys(root, jnp.asarray(padded)),
            num_steps=options.num_steps,
            guidance_scale=options.guidance_scale,
        )
        pixels = to_pixels(jax.device_get(samples.x))
        for number, image in zip(chunk, pixels, strict=False):
            if writes:
                with whole_file(folder / f"{number:05d}.png") as partial:
                    partial.write_bytes(png_bytes(image))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prior")


def _missing(folder: pathlib.Path, options: PriorOptions) -> list[int]:
    """Number the images that the folder lacks; ValueError if its images have another prompt.

    Pictures of the user's own count, whatever their names are.
    """
    about = folder / ABOUT
    prompt = json.loads(about.read_text())["prompt"] if about.is_file() else options.prompt
    if prompt != options.prompt:
        raise ValueError(
            f"{folder} holds images of {prompt!r}, and config.prior.prompt = {options.prompt!r}: "
            "name another config.prior.folder"
        )
    there = {path.name for path in _files(folder)}
    free = (number for number in itertools.count() if f"{number:05d}.png" not in there)
    return list(itertools.islice(free, max(0, options.num_images - len(there))))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in shown if path.suffix.lower() in _ENDINGS)
