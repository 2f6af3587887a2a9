"""What a page may ask for, and the sentences for everything else."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from support.experiments import built

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.serve.asking import describe, read


@pytest.fixture(scope="module")
def pipe():
    """A model whose weights nothing here reads."""
    return Pipeline(built("configs/mnist.py:tiny"), {}, {})


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_model_is_described_by_what_it_takes(pipe):
    about = describe(pipe)
    assert about["takes"] == "class" and about["classes"] == [str(i) for i in range(10)]
    assert about["size"] == [28, 28] and {"ddim", "euler"} <= set(about["samplers"])
    only_levels = describe(pipe._replace(experiment=built("configs/mnist.py:flow")))["samplers"]
    assert "euler" in only_levels and "ddim" not in only_levels


def test_fields_become_options_and_empty_ones_the_config(pipe):
    image = Image.fromarray(np.full((5, 7), 9, np.uint8))
    asked = read(
        {"condition": "3", "negative": "", "num_steps": None, "strength": 0.5, "sampler": "euler",
         "image": data_url(image), "mask": data_url(image)},
        pipe,
    )  # fmt: skip
    assert asked.sampler == "euler" and asked.conditions == "3"
    assert asked.options["n"] == 4 and asked.options["seed"] == 0
    assert asked.options["strength"] == 0.5 and "num_steps" not in asked.options
    np.testing.assert_array_equal(asked.options["image"], np.full((5, 7, 1), 9, np.uint8))
    assert asked.options["mask"].shape == (1, 5, 7, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"condition": 7}, "condition = '7' should be a text"),
        ({"n": 65}, "n = 65 should be between 1 and 64"),
        ({"n": 2.5}, "n = '2.5' should be a whole number"),
        ({"n": True}, "n = 'True' should be a whole number"),
        ({"num_steps": 0}, "num_steps = 0 should be between 1 and 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale = 'nan' should be a number"),
        ({"guidance_scale": 10**400}, "guidance_scale = 1000"),
        ({"strength": 10**400}, "strength = 1000"),
        ({"sampler": "eluer"}, "sampler = 'eluer' is unknown"),
        ({"image": "/etc/passwd"}, "image is not a readable picture"),
        ({"image": "data:;base64,AAAA"}, "image is not a readable picture"),
        ({"condition": "x" * 5000}, "condition has 5000 letters; 4000 are the most"),
        ({"path": "/etc"}, "path is not a field; choose from condition"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(pipe, asked, message):
    with pytest.raises(ValueError, match=message):
        read(asked, pipe)


def test_a_large_picture_is_refused(pipe):
    with pytest.raises(ValueError, match="4000 x 4 pixels; 2048 is the longest side"):
        read({"image": data_url(Image.new("L", (4000, 4)))}, pipe)
