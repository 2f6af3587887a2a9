"""Each network of a model gets its own weights: of its own file, of the checkpoint, or random."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.convert.weights.exporting import export_network
from diffusion_jax.convert.weights.importing import open_network
from diffusion_jax.convert.weights.places import export_checkpoint
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.weights import (
    check_frozen,
    is_released,
    load_frozen,
    load_released,
)
from diffusion_jax.experiment.task import Trained, Training

SDXL = "configs/sdxl.py:tiny"
TEXTS = ("clip", "open_clip")


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def shapes_of(tree):
    """What an array would be, each of its own sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def no_random():
    raise AssertionError("nothing here is to be drawn")


@pytest.fixture(scope="module")
def sdxl():
    """A model with two text encoders, and numbers for all that it holds."""
    weights = trained(SDXL)
    return built(SDXL), weights.params, weights.frozen


@pytest.fixture(scope="module", params=["file", "folder"])
def released(request, sdxl, tmp_path_factory):
    """The model as one file, and as a folder of diffusers."""
    experiment, params, frozen = sdxl
    folder = tmp_path_factory.mktemp("released")
    weights = Trained(params, {}, {**frozen, "scale_factor": np.float32(0.13)})
    if request.param == "file":
        experiment.task.export_file(weights, folder / "model.safetensors")
        return folder / "model.safetensors"
    experiment.task.export_folder(weights, folder / "model")
    return folder / "model"


def test_the_network_of_a_released_model_is_read(sdxl, released):
    experiment, params, _ = sdxl
    found, _, absent = load_released(
        experiment.network, shapes_of(params), {}, released, Training(1, 1)
    )
    same(found, params)
    assert absent == []


def test_every_encoder_gets_its_own_weights_out_of_a_whole_checkpoint(sdxl, released):
    experiment, _, frozen = sdxl
    found = load_frozen(experiment.network, shapes_of(frozen), no_random, released)
    for name in TEXTS:
        same(found["conditioner"][name], frozen["conditioner"][name])
    same(found["first_stage"], frozen["first_stage"])


def test_the_file_of_a_network_comes_before_the_checkpoint(sdxl, released, tmp_path):
    experiment, _, frozen = sdxl
    other = drawn(frozen["conditioner"]["clip"], 3)
    path = tmp_path / "other.safetensors"
    export_network(other, path, "clip text")
    network = experiment.network
    embedder = network.embedders["clip"]._replace(weights=str(path))
    network = network._replace(embedders={**network.embedders, "clip": embedder})
    found = load_frozen(network, shapes_of(frozen), no_random, released)["conditioner"]
    same(found["clip"], other)
    same(found["open_clip"], frozen["conditioner"]["open_clip"])


def test_without_a_checkpoint_the_weights_are_random_where_the_config_says_so(sdxl):
    experiment, _, frozen = sdxl
    found = load_frozen(experiment.network, shapes_of(frozen), lambda: frozen, None)
    same(found["conditioner"], frozen["conditioner"])
    same(found["first_stage"], frozen["first_stage"])
    check_frozen(experiment.network, None)
    network = experiment.network
    embedder = network.embedders["open_clip"]._replace(weights=None)
    network = network._replace(embedders={**network.embedders, "open_clip": embedder})
    check_frozen(network, "model.safetensors")
    with pytest.raises(ConfigError, match=r"embedders\.open_clip\.weights is not set: name a file"):
        check_frozen(network, None)


def test_a_part_of_a_released_model_can_be_left_as_it_is(sdxl, released):
    experiment, params, _ = sdxl
    before = drawn(params, 4)
    own = {**before, "logvar": np.zeros(3)}
    keys = (r"(model\.diffusion_model\.)?(out\.2|conv_out)\.",)
    training = Training(1, 1, ignore_keys=keys)
    found, _, absent = load_released(experiment.network, own, {}, released, training)
    assert absent == ["logvar"]
    same(found["network"]["out_2"], before["network"]["out_2"])
    for name in params["network"].keys() - {"out_2"}:
        same(found["network"][name], params["network"][name])


def test_what_a_folder_does_not_have_is_told_with_what_it_has(released):
    if released.is_dir():
        with pytest.raises(ValueError, match="has 2 parts named text_encoder, and number 3 is"):
            open_network(released, "clip text", 2)
        names = [open_network(released, "clip text", i).tensors.keys() for i in range(2)]
        assert any("text_projection" in name for name in names[1])
        assert not any("text_projection" in name for name in names[0])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("x.safetensors", True), ("x.ckpt", True), ("x.safetensors.index.json", True),
        ("x.pth", True), ("runs/x", False), ("x.json", False),
    ],
)  # fmt: skip
def test_released_files_are_told_from_runs_by_their_names(name, answer, tmp_path):
    assert is_released(tmp_path / name) is answer


def test_folders_are_told_apart_by_what_they_hold(released, tmp_path):
    assert is_released(released) and not is_released(tmp_path)


def test_a_file_is_released_whatever_its_name(tmp_path, released):
    for name in ("x.sft", "X.CKPT", "x"):
        (tmp_path / name).touch()
        assert is_released(tmp_path / name)
    if released.is_file():
        (tmp_path / "unet").mkdir()
        shutil.copy(released, tmp_path / "unet/diffusion_pytorch_model.non_ema.safetensors")
        assert is_released(tmp_path / "unet")


def test_a_file_without_the_encoder_that_has_a_file_of_its_own_is_enough(sdxl, tmp_path):
    """SDXL's second encoder is the only one in the checkpoint."""
    experiment, params, frozen = sdxl
    path, own = tmp_path / "x.safetensors", tmp_path / "clip.safetensors"
    export_network(frozen["conditioner"]["clip"], own, "clip text")
    parts = {
        "network": params["network"],
        "first_stage": frozen["first_stage"],
        "conditioner": {"text_2": frozen["conditioner"]["open_clip"]},
    }
    export_checkpoint(path, parts, "sdxl")
    network = experiment.network
    embedder = network.embedders["clip"]._replace(weights=str(own))
    network = network._replace(embedders={**network.embedders, "clip": embedder})
    found = load_frozen(network, shapes_of(frozen), no_random, path)["conditioner"]
    for name in TEXTS:
        same(found[name], frozen["conditioner"][name])
    with pytest.raises(ValueError, match="holds 1 network of the kind 'clip text', and config"):
        load_frozen(experiment.network, shapes_of(frozen), no_random, path)


def test_a_learned_scale_factor_is_read_and_stays(tmp_path):
    options = ["--config.first_stage.scale_factor=delete", "--config.first_stage.scale_by_std=True"]
    experiment, weights = built("configs/sd15.py:tiny", *options), trained("configs/sd15.py:tiny")
    learned = {**weights.frozen, "scale_factor": np.float32(0.5)}
    path = tmp_path / "x.safetensors"
    experiment.task.export_file(weights._replace(frozen=learned, ema=None), path)
    assert experiment.task.contradictions(path) == []
    shapes = experiment.abstract_frozen()
    frozen = experiment.task.load_frozen(shapes, no_random, path)
    assert float(frozen["scale_factor"]) == 0.5
    assert experiment.task.first_frozen(frozen, {"image": jnp.zeros((1, 32, 32, 3))}) is frozen
