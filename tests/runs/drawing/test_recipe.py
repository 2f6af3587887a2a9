"""The text in a PNG tells how it was drawn, in the form that other tools read."""

import re

import numpy as np
from support.experiments import built

from diffusion_jax.runs.drawing import recipe
from diffusion_jax.runs.drawing.recipe import (
    Recipe,
    find_recipe,
    loaded_facts,
    model_name,
    recipe_text,
)
from diffusion_jax.runs.inputs.seeds import Seeds

ASKED = dict(negative=None, num_steps=None, guidance_scale=None, seeds=Seeds(3), model="m")


def read(text):
    """Read it as AUTOMATIC1111's format is described: the last line is key: value pairs."""
    *prompt, last = text.split("\n")
    pairs = re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^"])*"|[^,]*)(?:,|$)', last)
    return prompt, dict(pairs)


def test_the_text_can_be_read_back(monkeypatch):
    monkeypatch.setattr(recipe, "code_facts", lambda: {"revision": "abc+"})
    given = Recipe(["a fox, red", "owl"], "blur", 30, "euler", 5.5, Seeds(7), (64, 32), "sd, 1: x")
    prompt, facts = read(recipe_text(given, 0))
    assert prompt == ["a fox, red", "Negative prompt: blur"]
    assert (facts["Steps"], facts["Sampler"], facts["CFG scale"]) == ("30", "euler", "5.5")
    assert (facts["Seed"], facts["Size"], facts["Image"]) == ("7", "32x64", "0")
    assert (facts["Model"], facts["Revision"]) == ('"sd, 1: x"', "abc+")
    alone = given._replace(negative=None, guidance_scale=None)
    prompt, facts = read(recipe_text(alone, 1))
    assert prompt == ["owl"] and "CFG scale" not in facts and facts["Image"] == "1"
    assert read(recipe_text(alone._replace(prompts=["same"]), 5))[0] == ["same"]
    assert read(recipe_text(alone._replace(prompts=[]), 5))[0] == [""]


def test_what_nobody_asked_for_is_as_the_config_says():
    experiment = built("configs/mnist.py:tiny")
    found = find_recipe(experiment, [7, "x"], (28, 14), **ASKED)
    assert (found.sampler, found.guidance_scale) == (experiment.sections["sampler"]["name"], 2.0)
    assert found.prompts == ["7", "x"] and found.size == (28, 14)
    assert found.num_steps == experiment.drawing.num_steps
    found = find_recipe(
        experiment, "owl", (28, 14), **{**ASKED, "num_steps": 2, "guidance_scale": 1.0}
    )
    assert (found.num_steps, found.guidance_scale, found.seeds.seed) == (2, 1.0, 3)
    assert found.prompts == ["owl"] and find_recipe(experiment, None, (1, 1), **ASKED).prompts == []


def test_a_config_without_a_sampler_draws_with_the_default():
    plain = built("configs/mnist.py:tiny", "--config.sampler=delete")
    assert find_recipe(plain, 7, (28, 28), **ASKED).sampler == "ddim"


def test_a_model_is_named_after_its_file_or_its_run():
    assert model_name("runs/mnist/") == "mnist" and model_name("runs/mnist", 80) == "mnist@80"
    assert model_name("x/sd_xl.safetensors") == "sd_xl.safetensors"


def test_each_image_tells_its_own_seed_and_its_variation():
    given = Recipe(["a fox"], None, 30, "euler", None, Seeds((7, 9), 4, 0.25), (64, 32), "m")
    _, facts = read(recipe_text(given, 1))
    assert (facts["Seed"], facts["Image"]) == ("9", "0")
    assert (facts["Variation seed"], facts["Variation seed strength"]) == ("4", "0.25")


def test_everything_asked_for_that_changes_an_image_is_told():
    experiment = built("configs/sd15.py:edit_tiny")
    image = np.zeros((2, 2, 3), np.uint8)
    options = dict(strength=0.6, resize="crop", conditioning_scale=0.8, image=image, mask=None)
    found = find_recipe(
        experiment, "a fox", (8, 8), **ASKED, options={**options, "prompt_weights": True, "n": 4}
    )
    _, facts = read(recipe_text(found, 0))
    assert facts["Prompt weights"] == "True" and facts["Resize mode"] == "crop"
    assert (facts["Denoising strength"], facts["ControlNet weight"]) == ("0.6", "0.8")
    assert facts["Image CFG scale"] == "1.5"  # the config's
    assert facts["Init image hash"] == "15ec7bf0b50732b4"[:12] and "Mask hash" not in facts
    plain = find_recipe(experiment, "a fox", (8, 8), **ASKED, options={"image_guidance_scale": 2.0})
    assert plain.more == {"Image CFG scale": 2.0}
    other = find_recipe(experiment, "a fox", (8, 8), **ASKED, options={"image": image + 1})
    assert other.more["Init image hash"] != facts["Init image hash"]
    trained = built("configs/sd15.py:tiny", "--config.conditioning.embedders.text.weighted=True")
    assert find_recipe(trained, "a fox", (8, 8), **ASKED).more == {"Prompt weights": True}


def test_files_beside_the_model_are_told_without_their_folders():
    facts = loaded_facts(
        loras={"a/style.safetensors": 0.8, "b.safetensors": 1.0},
        embeddings=[("c/toy.safetensors", "<my-toy>"), ("d.pt", None)],
        overrides=["--config.sampler.eta=0.5", "--config.data.source.folder=/home/me"],
        weights="raw",
    )
    assert facts == {
        "Weights": "raw",
        "LoRA": "style.safetensors:0.8, b.safetensors:1",
        "Embeddings": "toy.safetensors:<my-toy>, d.pt",
        "Options": "sampler.eta=0.5",
    }
    assert loaded_facts() == {}
    given = Recipe(["a fox"], None, 30, "euler", None, Seeds(1), (64, 32), "m", facts)
    assert read(recipe_text(given, 0))[1]["LoRA"] == '"style.safetensors:0.8, b.safetensors:1"'
