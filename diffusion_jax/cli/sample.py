"""`python launch.py sample`: draw images from a run and write a grid and single PNGs."""

import argparse
import datetime
import pathlib

import numpy as np

from diffusion_jax.build.conditions import Conditions
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.train.grids import image_grid, save_png


def run(arguments: argparse.Namespace) -> int:
    """Draw arguments.n images for each class asked for; return 0."""
    pipe = Pipeline.from_workdir(arguments.workdir, step=arguments.step, ema=not arguments.raw)
    conditions, n = _conditions(pipe, arguments.label, arguments.n)
    images = pipe(
        conditions,
        n=n,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    folder = pathlib.Path(arguments.out) if arguments.out else _default_folder(arguments.workdir)
    grid = write_images(folder, images)
    print(f"wrote {len(images)} images to {folder} and their grid to {grid}")
    return 0


def write_images(folder: pathlib.Path, images: np.ndarray) -> pathlib.Path:
    """Write uint8 images [b h w c] as 00000.png, ... and grid.png into a new or empty folder ->
    the grid's path."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files; choose an empty folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        save_png(folder / f"{index:05d}.png", image)
    columns = int(np.ceil(np.sqrt(len(images))))
    return save_png(folder / "grid.png", image_grid(images, columns=columns))


def _conditions(pipe: Pipeline, label: str | None, n: int) -> tuple[Conditions, int | None]:
    if not pipe.experiment.network.embedders:
        if label is not None:
            raise ValueError(f"--class={label} does not fit: this model is unconditional")
        return None, n
    if label is None:
        # Every class in turn, so that a first look shows them all.
        classes = pipe.num_classes()
        return [i % classes for i in range(n)], None
    return [part for part in label.split(",") for _ in range(n)], None


def _default_folder(workdir: str) -> pathlib.Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return pathlib.Path(workdir) / "samples" / stamp
