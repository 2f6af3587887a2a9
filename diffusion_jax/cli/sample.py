"""`sample`: draw images from a run or released weights, as a grid and single PNGs."""

import argparse
import pathlib
import sys
import warnings
from typing import Any

from diffusion_jax.cli.sample_video import draw_videos
from diffusion_jax.pipeline import NonFiniteWarning, Pipeline
from diffusion_jax.runs.conditions import Conditions, check_count, required_inputs
from diffusion_jax.runs.inputs import read_image, read_mask
from diffusion_jax.runs.samples import check_empty, default_folder, write_samples

DEFAULT_COUNT = 16


def run(arguments: argparse.Namespace) -> int:
    """Draw arguments.n images for each condition asked for; return 0, or 1 if any is not finite."""
    folder = pathlib.Path(arguments.out) if arguments.out else default_folder(arguments.workdir)
    check_empty(folder)
    pipe = _pipeline(arguments)
    if pipe.experiment.network.num_frames is not None:
        return draw_videos(pipe, arguments, folder)
    count = check_count(DEFAULT_COUNT if arguments.n is None else arguments.n)
    conditions, n = _conditions(pipe, arguments, count)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NonFiniteWarning)
        images = pipe(
            conditions,
            n=n,
            negative=arguments.negative_prompt,
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
            strength=arguments.strength,
            **_pictures(pipe, arguments),
        )
    grid = write_samples(folder, images)
    print(f"wrote {len(images)} images to {folder} and their grid to {grid}")
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    return int(any(warning.category is NonFiniteWarning for warning in told))


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
    """Read the files of --image and --mask as the model works on them."""
    pictures = {}
    if arguments.image is not None:
        channels = pipe.experiment.data.image_shape[-1]
        pictures["image"] = read_image(arguments.image, channels, flag="--image=")
    if arguments.mask is not None:
        pictures["mask"] = read_mask(arguments.mask, flag="--mask=")
    return pictures
