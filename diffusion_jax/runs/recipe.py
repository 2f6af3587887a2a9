"""How images were drawn, as the text in their files that other tools read."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.sampling import SAMPLER
from diffusion_jax.runs.conditions import Conditions
from diffusion_jax.runs.identity import code_facts
from diffusion_jax.runs.seeds import Seeds

# The text chunk of a PNG in which other tools look for it.
KEY = "parameters"


class Recipe(NamedTuple):
    """What images were drawn from. prompts: one for each image, or one for all; none is empty."""

    prompts: Sequence[str]
    negative: str | None
    num_steps: int
    sampler: str
    guidance_scale: float | None
    seeds: Seeds
    size: tuple[int, int]
    model: str


def find_recipe(
    experiment: Experiment,
    conditions: Conditions,
    size: tuple[int, int],
    *,
    model: str,
    negative: str | None,
    num_steps: int | None,
    guidance_scale: float | None,
    seeds: Seeds,
) -> Recipe:
    """Complete what a user asked for by what the config says.

    conditions: a prompt or a class for all images or for each; others are not told. size: (height,
    width). model: the name of what drew the images.
    """
    sections = experiment.sections
    guidance, sampler = sections["guidance"] or {}, sections["sampler"] or {}
    if guidance_scale is None and "scale" in guidance:
        guidance_scale = guidance["scale"]
    alone = isinstance(conditions, (str, int))
    given = [conditions] if alone else conditions if isinstance(conditions, Sequence) else []
    return Recipe(
        prompts=[str(condition) for condition in given],
        negative=negative,
        num_steps=experiment.drawing.num_steps if num_steps is None else num_steps,
        sampler=sampler["name"] if "name" in sampler else str(SAMPLER.default),
        guidance_scale=guidance_scale,
        seeds=seeds,
        size=size,
        model=model,
    )


def model_name(path: str, step: int | None = None) -> str:
    """Name a model after its file or its run, and a checkpoint of the run if one was asked for."""
    name = pathlib.Path(path).absolute().name
    return name if step is None else f"{name}@{step}"


def recipe_text(recipe: Recipe, index: int) -> str:
    """Write the recipe of image number `index` as AUTOMATIC1111's web interface does.

    The prompt, the negative prompt, and a line "Steps: 30, Sampler: euler, CFG scale: 5, Seed: 0,
    ...". "Image" is the number of the image among those that one seed draws; other tools ignore it.
    """
    prompts = recipe.prompts
    lines = [prompts[min(index, len(prompts) - 1)] if prompts else ""]
    if recipe.negative:
        lines.append(f"Negative prompt: {recipe.negative}")
    height, width = recipe.size
    seed, number = recipe.seeds.of_image(index)
    facts = {
        "Steps": recipe.num_steps,
        "Sampler": recipe.sampler,
        "CFG scale": recipe.guidance_scale,
        "Seed": seed,
        **recipe.seeds.facts(index),
        "Size": f"{width}x{height}",
        "Model": recipe.model,
        "Image": number,
        "Version": "diffusion_jax",
        "Revision": code_facts()["revision"],
    }
    told = {name: value for name, value in facts.items() if value is not None}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in told.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Quote a value that could be taken for several."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
