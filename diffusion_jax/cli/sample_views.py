"""`sample` with a model of several views: draw a video from all other sides."""

import argparse
import pathlib
from typing import Any

import numpy as np

from diffusion_jax.cli.drawing import draw
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.clips import read_clip
from diffusion_jax.runs.conditions import FRAME_NAME, required_inputs
from diffusion_jax.runs.frames import POLARS
from diffusion_jax.runs.samples import write_clips
from diffusion_jax.runs.views import NUM_FRAMES, ORBIT, VIDEO, prepared_video, used_frames

# Of the videos that the scripts of SV4D write, where the given one does not say it.
_FPS = 10.0
# Files with weights of SV3D, which draw the orbit.
_WEIGHTS = (".safetensors", ".ckpt")


def draw_views(
    pipe: Pipeline, arguments: argparse.Namespace, folder: pathlib.Path, angles: dict[str, Any]
) -> int:
    """Draw a clip for each new view; return 0, or 1 if any is not finite."""
    network, takes_orbit = pipe.experiment.network, pipe.experiment.network.first_views == "orbit"
    if arguments.image is None:
        raise ValueError("this model draws views of a video: give it as --image=FILE")
    if arguments.n is not None:
        raise ValueError("--n does not fit: this model draws one clip for each view")
    if takes_orbit and arguments.orbit is None:
        raise ValueError("this model needs --orbit=FILE: SV3D's weights, or a video that it drew")
    if not takes_orbit and arguments.orbit is not None:
        raise ValueError("--orbit does not fit: this model draws the first views by itself")
    count = used_frames(network, arguments.num_frames)
    clip = read_clip(arguments.image, count, flag="--image=")
    conditions = {VIDEO: clip.frames, **angles}
    if takes_orbit:
        conditions[ORBIT] = _orbit(pipe, arguments, clip.frames, angles)

    def write(clips: np.ndarray) -> str:
        written = ", ".join(map(str, write_clips(folder, clips, clip.fps or _FPS)))
        return f"wrote {len(clips)} views of {clips.shape[1]} frames: {written}"

    return draw(pipe, conditions, arguments, write)


def _orbit(
    pipe: Pipeline, arguments: argparse.Namespace, frames: list[Any], angles: dict[str, Any]
) -> Any:
    """Read the orbit around the first frame, or draw it with SV3D's weights."""
    path = pathlib.Path(arguments.orbit)
    if path.suffix not in _WEIGHTS:
        return read_clip(path, NUM_FRAMES + 1, flag="--orbit=").frames
    default = pipe.experiment.data.image_shape[:2]
    size = (arguments.height or default[0], arguments.width or default[1])
    first = prepared_video(pipe.experiment.network, frames, size)[0]
    sv3d = Pipeline.from_checkpoint(path)
    takes_angles = POLARS in required_inputs(sv3d.experiment.network)
    given = {FRAME_NAME: first, **(angles if takes_angles else {})}
    return sv3d(given, num_frames=NUM_FRAMES, num_steps=arguments.steps, seed=arguments.seed)[0]
