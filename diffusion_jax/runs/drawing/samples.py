"""A folder of drawn images: single PNGs and their grid."""

import datetime
import importlib.util
import logging
import os
import pathlib
from typing import NamedTuple

import numpy as np

from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.runs.drawing.recipe import KEY, Recipe, recipe_text
from diffusion_jax.train.pictures import image_grid, png_bytes
from diffusion_jax.train.videos import save_clip

_log = logging.getLogger(__name__)


class Pictures(NamedTuple):
    """Drawn images and a grid of all of them, as the bytes of PNG files."""

    images: list[bytes]
    grid: bytes


def encode_samples(images: np.ndarray, recipe: Recipe | None = None) -> Pictures:
    """Encode uint8 images [b h w c] and their grid as PNG files.

    recipe: how they were drawn, which each file tells. The grid tells how its first image was.
    """
    columns = int(np.ceil(np.sqrt(len(images))))
    return Pictures(
        [png_bytes(image, _texts(recipe, index)) for index, image in enumerate(images)],
        png_bytes(image_grid(images, columns=columns), _texts(recipe, 0)),
    )


def write_samples(
    folder: pathlib.Path, images: np.ndarray, recipe: Recipe | None = None
) -> pathlib.Path:
    """Write uint8 images [b h w c] as 00000.png, ... and grid.png -> the path of the grid.

    recipe: see encode_samples. Raises ValueError when the folder holds files already.
    """
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = encode_samples(images, recipe)
    names = [f"{index:05d}.png" for index in range(len(images))] + ["grid.png"]
    for name, content in zip(names, [*pictures.images, pictures.grid], strict=True):
        with whole_file(folder / name) as partial:
            partial.write_bytes(content)
    return folder / "grid.png"


def _texts(recipe: Recipe | None, index: int) -> dict[str, str]:
    return {} if recipe is None else {KEY: recipe_text(recipe, index)}


def write_clips(folder: pathlib.Path, clips: np.ndarray, fps: float) -> list[pathlib.Path]:
    """Write uint8 clips [b t h w c] -> the paths: videos, GIFs, contact sheets, folders of frames.

    00000.mp4 is left out, and the log says so, where PyAV is not installed.
    Raises ValueError when the folder holds files already.
    """
    check_empty(folder)
    endings = [".mp4", ".gif", ".png", ""]
    if importlib.util.find_spec("av") is None:
        _log.warning("no .mp4 is written, which needs av: pip install av")
        endings.remove(".mp4")
    return [
        save_clip(folder / f"{number:05d}{ending}", clip, fps=fps)
        for number, clip in enumerate(clips)
        for ending in endings
    ]


def check_empty(folder: pathlib.Path) -> None:
    """Raise ValueError when images cannot go to a folder, or there is something in it."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is a file; choose an empty folder with --out")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--out = {folder} cannot be written: {place} is not writable")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files; choose an empty folder with --out")


def default_folder(workdir: str | None) -> pathlib.Path:
    """Name a new folder of samples by the time, in a run's folder or the working directory."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return pathlib.Path(workdir or ".") / "samples" / stamp
