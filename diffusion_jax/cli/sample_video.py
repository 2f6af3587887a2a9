"""`sample` with a model of videos: draw clips that begin with a picture."""

import argparse
import pathlib
from typing import Any

import numpy as np

from diffusion_jax.cli.drawing import draw
from diffusion_jax.cli.sample_views import draw_views
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.conditions import FRAME_NAME, required_inputs
from diffusion_jax.runs.frames import POLARS, frame_rate
from diffusion_jax.runs.inputs import read_picture
from diffusion_jax.runs.samples import write_clips

_FOR_IMAGES = (
    *("label", "prompt", "negative_prompt", "strength", "mask", "control_image"),
    *("resize", "image_guidance_scale"),
)


def draw_videos(pipe: Pipeline, arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    """Draw arguments.n clips, 1 by default, or views; return 0, or 1 if any is not finite."""
    for name in _FOR_IMAGES:
        if getattr(arguments, name) is not None:
            flag = "class" if name == "label" else name
            raise ValueError(f"--{flag} does not fit: this model makes videos of a picture")
    if pipe.experiment.network.num_views is not None:
        return draw_views(pipe, arguments, folder, _angles(arguments))
    if arguments.orbit is not None:
        raise ValueError("--orbit does not fit: this model draws one view")
    conditions = _conditions(pipe, arguments)

    def write(clips: np.ndarray) -> str:
        rate = frame_rate(pipe.experiment.network, arguments.fps)
        written = ", ".join(map(str, write_clips(folder, clips, rate)))
        return f"wrote {len(clips)} videos of {clips.shape[1]} frames: {written}"

    n = 1 if arguments.n is None else arguments.n
    return draw(pipe, conditions, arguments, write, n=n)


def _conditions(pipe: Pipeline, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Read --image, and the angles of the camera for a model that has them as inputs."""
    known = required_inputs(pipe.experiment.network)
    conditions: dict[str, Any] = {}
    if FRAME_NAME in known:
        if arguments.image is None:
            raise ValueError("this model makes videos of a picture: give --image=FILE")
        conditions[FRAME_NAME] = read_picture(arguments.image, flag="--image=")
    angles = {"elevation": arguments.elevation, "azimuths": arguments.azimuths}
    for name, value in angles.items():
        if value is not None and POLARS not in known:
            raise ValueError(f"--{name} does not fit: this model is not told where the camera is")
    return {**conditions, **_angles(arguments)} or None


def _angles(arguments: argparse.Namespace) -> dict[str, Any]:
    angles: dict[str, Any] = {}
    if arguments.elevation is not None:
        angles["elevations"] = arguments.elevation
    if arguments.azimuths is not None:
        angles["azimuths"] = _numbers("--azimuths", arguments.azimuths)
    return angles


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag}={text} should be numbers with commas between them") from error
