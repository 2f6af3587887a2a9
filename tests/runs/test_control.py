"""Pictures and scales for ControlNets, from a caller or from a flag, become inputs of a call."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.experiment.control import scale_key
from diffusion_jax.experiment.network import Network
from diffusion_jax.models.conditioning.embedders import concat_image
from diffusion_jax.models.conditioning.routing import HINT
from diffusion_jax.runs.control import read_control, with_control

SIZE = (8, 8)
GREY = np.full((8, 8), 255, np.uint8)


def network(*names):
    """A network of which only the names of its ControlNets and their columns are read."""
    embedders = {
        HINT.format(name): concat_image(input_key=f"hint_{name}", channels=3) for name in names
    }
    return Network(None, embedders, "none", (8, 8, 3), controls=dict.fromkeys(names))


def test_a_picture_and_a_scale_reach_their_inputs():
    found = with_control(network("edges"), {}, GREY, 0.5, SIZE)
    assert found[scale_key("edges")] == [[0.5]]
    np.testing.assert_array_equal(found["hint_edges"], np.ones((1, 8, 8, 3), np.float32))


def test_one_scale_serves_all_and_a_dict_names_each():
    both = network("edges", "depth")
    pictures = {"edges": GREY, "depth": GREY // 255}
    found = with_control(both, {}, pictures, None, SIZE)
    assert found[scale_key("edges")] == found[scale_key("depth")] == [[1.0]]
    assert found["hint_depth"].max() < -0.9 < 0.9 < found["hint_edges"].min()
    found = with_control(both, {}, pictures, {"edges": 0.0, "depth": 2.0}, SIZE)
    assert (found[scale_key("edges")], found[scale_key("depth")]) == ([[0.0]], [[2.0]])


@pytest.mark.parametrize(
    ("names", "image", "scale", "message"),
    [
        ((), GREY, None, "this model has no ControlNet; config.control names one"),
        ((), None, 0.5, "this model has no ControlNet"),
        (("edges",), None, None, "control_image is missing: this model has the ControlNet edges"),
        (("a", "b"), GREY, None, "control_image should be a dict with a picture for each of a, b"),
        (("a", "b"), {"a": GREY}, None, "control_image has a; it should have a, b"),
        (("a",), GREY, {"b": 1.0}, "conditioning_scale has b; it should have a"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(names, image, scale, message):
    with pytest.raises(ValueError, match=message):
        with_control(network(*names), {}, image, scale, SIZE)


def test_without_a_controlnet_the_conditions_stay():
    conditions = {"label": [1]}
    assert with_control(network(), conditions, None, None, SIZE) is conditions


def test_a_flag_holds_a_file_and_a_scale(tmp_path):
    file = tmp_path / "hint.png"
    Image.fromarray(np.repeat(GREY[..., None], 3, -1)).save(file)
    for text, want in ((f"{file}", 1.0), (f"{file}:0.8", 0.8)):
        picture, scale = read_control(text, flag="--control_image=")
        assert scale == want and picture.shape == (8, 8, 3) and picture.min() == 255
    edges, scale = read_control(f"canny:{file}:2", flag="--control_image=")
    assert scale == 2.0 and edges.max() == 0  # a white picture has no edges
    with pytest.raises(ValueError, match=r"--control_image=.*hint.png:much should be FILE:SCALE"):
        read_control(f"{file}:much", flag="--control_image=")
