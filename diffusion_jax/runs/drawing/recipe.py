"""How images were drawn, as the text in their files that other tools read."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.sampling import SAMPLER
from diffusion_jax.runs.identity import code_facts
from diffusion_jax.runs.inputs.conditions import Conditions
from diffusion_jax.runs.inputs.seeds import Seeds

# The text chunk of a PNG in which other tools look for it.
KEY = "parameters"
# Options of a call that change an image -> what they are called in the text. The names that the
# web interface knows are as it writes them.
_NUMBERS = {
    "strength": "Denoising strength",
    "image_guidance_scale": "Image CFG scale",
    "resize": "Resize mode",
    "conditioning_scale": "ControlNet weight",
    "denoising_start": "Denoising start",
    "denoising_end": "Denoising end",
}
_ARRAYS = {
    "image": "Init image",
    "mask": "Mask",
    "control_image": "ControlNet image",
    "latents": "Latents",
    "noise": "Noise",
    "step_noise": "Step noise",
}
# Sections of a config that may be changed for drawing.
_CHANGEABLE = ("sampler", "guidance", "discretization")


class Recipe(NamedTuple):
    """What images were drawn from.

    prompts: one for each image, or one for all; none is empty. more: further facts by name.
    """

    prompts: Sequence[str]
    negative: str | None
    num_steps: int
    sampler: str
    guidance_scale: float | None
    seeds: Seeds
    size: tuple[int, int]
    model: str
    more: Mapping[str, Any] = MappingProxyType({})


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
    options: Mapping[str, Any] = MappingProxyType({}),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """Complete what a user asked for by what the config says.

    conditions: a prompt or a class for all images or for each; others are left out. size: (height,
    width). model: the name of what drew the images. options: of the Pipeline's call; the text
    has those that change an image. more: further facts by name, such as loaded_facts.
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
        more={**_call_facts(experiment, options), **more},
    )


def _call_facts(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """Say what else a call was asked for that changes an image, and which pictures it saw."""
    given = {name: value for name, value in options.items() if value is not None}
    guidance = experiment.sections["guidance"] or {}
    if "image_scale" in guidance:
        given = {"image_guidance_scale": guidance["image_scale"]} | given
    tokenizers = [tokenize for _, tokenize in experiment.network.tokenize.values()]
    if any(tokenize.weighted for tokenize in tokenizers):
        given = {"prompt_weights": True} | given
    facts: dict[str, Any] = {}
    if "prompt_weights" in given and tokenizers:
        facts["Prompt weights"] = given["prompt_weights"]
    facts |= {label: given[name] for name, label in _NUMBERS.items() if name in given}
    for name, label in _ARRAYS.items():
        if name in given:
            facts[f"{label} hash"] = _hash(given[name])
    return facts


def _hash(given: Any) -> str:
    """Hash the values of an array or a picture, or of several by name."""
    if isinstance(given, Mapping):
        return " ".join(f"{name} {_hash(value)}" for name, value in given.items())
    return hashlib.sha256(np.ascontiguousarray(given).tobytes()).hexdigest()[:12]


def loaded_facts(
    *,
    loras: Mapping[str | os.PathLike, float] = MappingProxyType({}),
    embeddings: Sequence[tuple[str, str | None]] = (),
    overrides: Sequence[str] = (),
    weights: str | None = None,
) -> dict[str, str]:
    """Say what drew images besides the model's own weights and config.

    loras, embeddings: see Pipeline.with_lora and with_embedding; files are named without their
    folders. overrides: "--config.sampler.eta=1"; the sections that only drawing reads are named.
    weights: which ones, such as "raw".
    """
    name = lambda path: pathlib.Path(path).name  # noqa: E731
    added = [name(path) + (f":{token}" if token else "") for path, token in embeddings]
    changed = [text.removeprefix("--config.") for text in overrides]
    facts = {
        "Weights": weights or "",
        "LoRA": ", ".join(f"{name(path)}:{weight:g}" for path, weight in loras.items()),
        "Embeddings": ", ".join(added),
        "Options": ", ".join(one for one in changed if one.startswith(_CHANGEABLE)),
    }
    return {key: text for key, text in facts.items() if text}


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
        **recipe.more,
        "Model": recipe.model,
        "Image": number,
        "Version": "diffusion_jax",
        "Revision": code_facts()["revision"],
    }
    known = {name: value for name, value in facts.items() if value is not None}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in known.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Quote a value that could be taken for several."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
