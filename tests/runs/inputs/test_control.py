"""What a user gives to ControlNets becomes inputs of a call, or one sentence."""

import jax
import numpy as np
import pytest
from PIL import Image
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.experiment.network.control import scale_key
from diffusion_jax.runs.inputs.control import read_control, with_control
from diffusion_jax.runs.weights import first_state

ONE, TWO = "configs/sd15.py:control_tiny", "--config.control.depth.column=depth"
SIZE = (8, 12)


def network(*overrides):
    return built(ONE, *overrides).network


def picture(value=255, size=SIZE):
    return np.full((*size, 3), value, np.uint8)


def test_a_picture_becomes_a_hint_and_counts_once():
    found = with_control(network(), "a fox", picture(), None, SIZE)
    assert found["caption"] == "a fox" and found.keys() == {
        "caption", "conditioning_image", scale_key("edges")
    }  # fmt: skip
    hint = found["conditioning_image"]
    assert hint.shape == (1, *SIZE, 3) and hint.dtype == np.float32 and np.all(hint == 1.0)
    assert found[scale_key("edges")] == [[1.0]]


@pytest.mark.parametrize(
    "given",
    [
        np.zeros(SIZE, np.uint8),
        np.zeros((16, 24, 3), np.uint8),
        Image.new("L", (12, 8)),
        Image.new("RGB", (24, 16)),
    ],
)
def test_grey_pictures_and_other_sizes_are_made_to_fit(given):
    hint = with_control(network(), "a fox", given, 0.5, SIZE)["conditioning_image"]
    assert hint.shape == (1, *SIZE, 3) and np.all(hint == -1.0)


def test_each_image_of_a_call_may_have_its_own():
    two = np.stack([picture(0), picture(255)])
    hint = with_control(network(), ["a", "b"], two, 2, SIZE)["conditioning_image"]
    assert hint.shape == (2, *SIZE, 3) and hint[0].max() == -1.0 and hint[1].min() == 1.0


def test_several_take_pictures_and_scales_by_name():
    both = network(TWO)
    pictures = {"edges": picture(0), "depth": picture(255)}
    found = with_control(both, "a fox", pictures, {"edges": 0.5, "depth": 2}, SIZE)
    assert found["conditioning_image"].max() == -1.0 and found["depth"].min() == 1.0
    assert (found[scale_key("edges")], found[scale_key("depth")]) == ([[0.5]], [[2.0]])
    same = with_control(both, "a fox", pictures, 0.25, SIZE)
    assert same[scale_key("edges")] == same[scale_key("depth")] == [[0.25]]


@pytest.mark.parametrize(
    ("overrides", "image", "scale", "message"),
    [
        ((), None, None, "control_image is missing: this model has the ControlNet edges"),
        ((), picture().astype(np.float32), None, "control_image has dtype float32"),
        ((), picture(), float("nan"), "conditioning_scale = nan should be a finite number"),
        ((), {"depth": picture()}, None, "control_image has depth; it should have edges"),
        ((TWO,), picture(), None, "control_image should be a dict with a picture for each of"),
        ((TWO,), {}, None, "control_image has nothing; it should have"),
        (
            (TWO,),
            {"edges": picture(), "depth": picture()},
            {"edges": 1.0},
            "conditioning_scale has edges; it should have",
        ),
    ],
)
def test_what_does_not_fit_is_told(overrides, image, scale, message):
    with pytest.raises(ValueError, match=message):
        with_control(network(*overrides), "a fox", image, scale, SIZE)


def test_a_model_without_any_takes_none():
    plain = built("configs/sd15.py:tiny").network
    assert with_control(plain, "a fox", None, None, SIZE) == "a fox"
    for image, scale in ((picture(), None), (None, 0.5)):
        with pytest.raises(ValueError, match="this model has no ControlNet; config.control names"):
            with_control(plain, "a fox", image, scale, SIZE)


def test_a_flag_names_a_file_a_scale_and_what_is_made_of_it(tmp_path):
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[6:18, 6:18] = 255
    path = tmp_path / "square.png"
    Image.fromarray(pixels).save(path)
    for text, scale in ((f"{path}", 1.0), (f"{path}:0.8", 0.8)):
        found = read_control(text, flag="--control_image=")
        np.testing.assert_array_equal(found[0], pixels)
        assert found[1] == scale
    edges, scale = read_control(f"canny:{path}:0.5", flag="--control_image=")
    assert scale == 0.5 and edges.shape == pixels.shape and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255} and not edges[12, 12].any()
    with pytest.raises(ValueError, match=r"square.png:much should be FILE:SCALE, such as /.*:0.8"):
        read_control(f"{path}:much", flag="--control_image=")
    with pytest.raises(FileNotFoundError, match="--control_image=.*none.png"):
        read_control(f"{tmp_path}/none.png", flag="--control_image=")


def test_a_new_run_may_donate_its_state_and_keep_the_base_that_it_was_copied_from():
    experiment, frozen = built(ONE), trained(ONE).frozen
    state = first_state(experiment, drawn(experiment.abstract_state(), 5), frozen)
    edges, base = state.params["control"]["edges"], frozen["network"]
    np.testing.assert_array_equal(edges["middle_block_1"]["norm"]["scale"],
                                  base["middle_block_1"]["norm"]["scale"])  # fmt: skip
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(base))
