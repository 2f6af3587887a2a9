"""`sample`: draw images from a run or released weights, as a grid and single PNGs."""

import argparse
import pathlib
from typing import Any

import numpy as np

from diffusion_jax.cli.drawing import draw
from diffusion_jax.cli.sample_video import draw_videos
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.conditions import Conditions, check_count, required_inputs
from diffusion_jax.runs.control import read_control
from diffusion_jax.runs.inputs import read_image, read_mask
from diffusion_jax.runs.lora import parse_loras
from diffusion_jax.runs.recipe import find_recipe, model_name
from diffusion_jax.runs.samples import check_empty, default_folder, write_samples

DEFAULT_COUNT = 16
_TOLD = dict(
    negative="negative_prompt", num_steps="steps", guidance_scale="guidance_scale", seed="seed"
)


def run(arguments: argparse.Namespace) -> int:
    """Draw arguments.n images for each condition asked for; return 0, or 1 if any is not finite."""
    folder = pathlib.Path(arguments.out) if arguments.out else default_folder(arguments.workdir)
    check_empty(folder)
    loras = parse_loras(arguments.lora)
    pipe = _pipeline(arguments)
    pipe = pipe.with_lora(loras) if loras else pipe
    if pipe.experiment.network.num_frames is not None:
        return draw_videos(pipe, arguments, folder)
    for name in ("elevation", "azimuths", "orbit"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} does not fit: this model draws images")
    count = check_count(DEFAULT_COUNT if arguments.n is None else arguments.n)
    conditions, n = _conditions(pipe, arguments, count)

    def write(images: np.ndarray) -> str:
        recipe = find_recipe(
            pipe.experiment,
            conditions,
            images.shape[1:3],
            model=model_name(arguments.workdir or arguments.checkpoint, arguments.step),
            **{name: getattr(arguments, flag) for name, flag in _TOLD.items()},
        )
        grid = write_samples(folder, images, recipe)
        return f"wrote {len(images)} images to {folder} and their grid to {grid}"

    shared = ("strength", "resize", "image_guidance_scale")
    options = {name: getattr(arguments, name) for name in shared}
    options["negative"] = arguments.negative_prompt
    return draw(pipe, conditions, arguments, write, n=n, **options, **_pictures(pipe, arguments))


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    if bool(arguments.workdir) == bool(arguments.checkpoint):
        raise ValueError("give --workdir=RUN, or --checkpoint=FILE with --config=configs/x.py")
    if arguments.workdir:
        return Pipeline.from_workdir(
            arguments.workdir,
            step=arguments.step,
            ema=not arguments.raw,
            overrides=arguments.overrides,
        )
    variant = [f"--config.train.ckpt_variant={arguments.variant}"] if arguments.variant else []
    return Pipeline.from_checkpoint(
        arguments.checkpoint,
        arguments.config,
        overrides=[*variant, *arguments.overrides],
        ema=arguments.ema,
    )


def _conditions(
    pipe: Pipeline, arguments: argparse.Namespace, count: int
) -> tuple[Conditions, int | None]:
    label, prompt = arguments.label, arguments.prompt
    if label is not None and prompt is not None:
        raise ValueError(f"give --class={label} or --prompt={prompt!r}, not both")
    if not pipe.experiment.network.embedders:
        if label is not None or prompt is not None:
            given = f"--class={label}" if label is not None else f"--prompt={prompt!r}"
            raise ValueError(f"{given} does not fit: this model is unconditional")
        return None, count
    if "caption" in required_inputs(pipe.experiment.network):
        if prompt is None:
            raise ValueError('this model reads text: give --prompt="..."')
        return prompt, count
    if prompt is not None:
        raise ValueError(f"--prompt={prompt!r} does not fit: this model reads no text")
    if label is None:
        # Every class in turn, so that a first look shows them all.
        classes = pipe.num_classes()
        return [i % classes for i in range(count)], None
    return [part for part in label.split(",") for _ in range(count)], None


def _pictures(pipe: Pipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the files of --image, --mask and --control_image as the model works on them."""
    pictures: dict[str, Any] = {}
    if arguments.image is not None:
        channels = pipe.experiment.data.image_shape[-1]
        pictures["image"] = read_image(arguments.image, channels, flag="--image=")
    if arguments.mask is not None:
        pictures["mask"] = read_mask(arguments.mask, flag="--mask=")
    if arguments.control_image is not None:
        found = read_control(arguments.control_image, flag="--control_image=")
        pictures["control_image"], pictures["conditioning_scale"] = found
    return pictures
