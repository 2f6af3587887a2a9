"""What `sample` was asked for; test_asked_videos.py and test_asked_views.py are on videos."""

import numpy as np
import pytest
from PIL import Image
from support.experiments import built

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.command_line import fields_of
from diffusion_jax.runs.drawing.asked import Asked, make_call


def call(tmp_path, config="configs/mnist.py:tiny", **asked):
    model = Pipeline(built(config), {}, {})
    return make_call(model, Asked(**asked), tmp_path / "out", name="x", load=lambda path: None)


def test_every_field_is_a_flag_of_the_same_default():
    given = vars(parse_arguments(["sample"]))
    assert {name: given[name] for name in Asked._fields} == Asked._field_defaults


def test_a_class_is_repeated_and_the_files_tell_of_the_model(tmp_path):
    found = call(tmp_path, label="3", n=2, steps=7, guidance_scale=1.5)
    assert found.conditions == ["3", "3"] and found.options["n"] is None
    assert (found.options["num_steps"], found.options["guidance_scale"]) == (7, 1.5)
    said = found.write(np.zeros((2, 4, 4, 1), np.uint8))
    assert said == f"wrote 2 images to {tmp_path}/out and their grid to {tmp_path}/out/grid.png"


def test_the_files_tell_which_pictures_were_given(tmp_path):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "photo.png")
    model = Pipeline(built("configs/mnist.py:tiny"), {}, {})
    asked = Asked(label="3", n=1, image=str(tmp_path / "photo.png"), strength=0.5)
    given = dict(name="x", load=lambda path: None, more={"LoRA": "a:0.8"})
    make_call(model, asked, tmp_path / "out", **given).write(np.zeros((1, 4, 4, 1), np.uint8))
    text = Image.open(tmp_path / "out/00000.png").info["parameters"]
    for fact in ("Denoising strength: 0.5, ", "Init image: photo.png, ", 'LoRA: "a:0.8"'):
        assert fact in text


def test_brackets_weigh_words_only_if_that_is_asked_for(tmp_path):
    for flags, wanted in (([], None), (["--prompt_weights"], True)):
        asked = fields_of(Asked, parse_arguments(["sample", *flags]))
        options = call(tmp_path, **asked._replace(label="3")._asdict()).options
        assert options["prompt_weights"] is wanted


@pytest.mark.parametrize("flag", ["elevation", "azimuths", "orbit"])
def test_flags_of_videos_do_not_fit_a_model_of_images(tmp_path, flag):
    with pytest.raises(ValueError, match=f"--{flag} does not fit: this model draws images"):
        call(tmp_path, **{flag: "1"})


def test_angles_are_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"--azimuths=1,x should be numbers with commas between"):
        call(tmp_path, "configs/sv4d.py:2_tiny", image=__file__, azimuths="1,x")


def test_several_seeds_draw_as_many_images_unless_a_number_is_given(tmp_path):
    found = call(tmp_path, label="3,4", seed="5,6", variation_seed="7", variation_strength=0.25)
    assert found.conditions == ["3", "4"] and found.options["seed"] == [5, 6]
    assert found.options["variation_seed"] == 7 and found.options["variation_strength"] == 0.25
    assert call(tmp_path, label="3", seed="5,6").conditions == ["3", "3"]
    assert call(tmp_path, label="3", seed="5", n=4).conditions == ["3"] * 4
    with pytest.raises(ValueError, match="--seed=5-6 should be a whole number, or a list: 1,2,3"):
        call(tmp_path, label="3", seed="5-6")
