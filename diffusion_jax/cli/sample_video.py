"""`sample` with a model of videos: draw clips that begin with a picture."""

import argparse
import pathlib
import sys
import warnings
from typing import Any

from diffusion_jax.pipeline import NonFiniteWarning, Pipeline
from diffusion_jax.runs.conditions import FRAME_NAME, required_inputs
from diffusion_jax.runs.frames import POLARS, frame_rate
from diffusion_jax.runs.inputs import read_picture
from diffusion_jax.runs.samples import write_clips

_FOR_IMAGES = ("label", "prompt", "negative_prompt", "strength", "mask")


def draw_videos(pipe: Pipeline, arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    """Draw arguments.n clips, 1 by default; return 0, or 1 if any is not finite."""
    for name in _FOR_IMAGES:
        if getattr(arguments, name) is not None:
            flag = "class" if name == "label" else name
            raise ValueError(f"--{flag} does not fit: this model makes videos of a picture")
    conditions = _conditions(pipe, arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NonFiniteWarning)
        clips = pipe(
            conditions,
            n=1 if arguments.n is None else arguments.n,
            num_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.num_frames,
            fps=arguments.fps,
            motion_bucket_id=arguments.motion_bucket_id,
            cond_aug=arguments.cond_aug,
        )
    written = write_clips(folder, clips, frame_rate(pipe.experiment.network, arguments.fps))
    print(f"wrote {len(clips)} videos of {clips.shape[1]} frames: {', '.join(map(str, written))}")
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    return int(any(warning.category is NonFiniteWarning for warning in told))


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
    if arguments.elevation is not None:
        conditions["elevations"] = arguments.elevation
    if arguments.azimuths is not None:
        conditions["azimuths"] = _numbers("--azimuths", arguments.azimuths)
    return conditions or None


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag}={text} should be numbers with commas between them") from error
