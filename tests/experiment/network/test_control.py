"""The `control` section: a ControlNet is trained beside a network that stays as it is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.binding import ConfigError

SD15, TINY = "configs/sd15.py:tiny", "configs/sd15.py:control_tiny"
EDGES = "--config.control.edges"


def compiled(function):
    """Compile with little optimisation: each runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def started():
    """A ControlNet that has just been copied from random frozen weights, and these."""
    experiment, frozen = built(TINY), trained(TINY).frozen
    params = compiled(lambda key: experiment.task.init(key).params)(jax.random.key(0))
    return experiment.task.first_params(params, frozen), frozen


def test_the_copy_alone_is_trained_and_begins_as_the_base(started):
    state = built(TINY).abstract_state()
    assert state.params.keys() == {"control"} and state.params["control"].keys() == {"edges"}
    params, frozen = started
    edges, base = params["control"]["edges"], frozen["network"]
    shared = [name for name in edges if name in base]
    ours = [name for name in base if not name.startswith("out")]
    assert shared and set(shared) == set(ours)
    for name in shared:
        jax.tree.map(np.testing.assert_array_equal, edges[name], base[name])
    assert not np.any(edges["middle_block_out_0"]["kernel"])


@pytest.mark.slow
def test_the_first_loss_is_the_one_of_the_base_and_only_the_copy_learns(started):
    experiment = built(TINY)
    plain = built(SD15, "--config.conditioning.embedders.text.ucg_rate=0.5")
    params, frozen = started
    image = np.float32(np.random.default_rng(0).uniform(-1, 1, (8, 32, 32, 3)))
    batch = experiment.task.with_inputs({"image": image, "caption": np.array(["a fox"] * 8)})
    assert batch["conditioning_image"].shape == image.shape
    batch = {name: jnp.asarray(value) for name, value in batch.items() if name != "caption"}
    own = {"network": frozen["network"], "conditioner": {}}
    losses = [
        compiled(task.eval_step)(weights, {}, frozen, batch, 0)["loss"]
        for task, weights in ((experiment.task, params), (plain.task, own))
    ]
    assert losses[0] == losses[1] > 0.0
    loss = lambda p, batch: experiment.task.eval_step(p, {}, frozen, batch, 0)["loss"]
    gradients = compiled(jax.grad(loss))(params, batch)["control"]["edges"]
    first = [name for name in gradients if name.startswith(("zero_convs", "middle_block_out"))]
    assert len(first) == 5 and all(np.any(gradients[name]["kernel"]) for name in first)


def test_files_and_folders_hold_it_bit_by_bit_in_their_names(tmp_path):
    experiment, weights = built(TINY), trained(TINY)._replace(ema=None)
    single, folder = tmp_path / "control.safetensors", tmp_path / "folder"
    assert experiment.task.layout(weights) == "controlnet"
    assert experiment.task.export_file(weights, single) == "controlnet"
    experiment.task.export_folder(weights, folder)
    names = open_weights(single).tensors
    assert "control_model.zero_convs.0.0.weight" in names
    assert {name.split(".")[0] for name in names} == {"control_model"}
    assert "controlnet_down_blocks.0.weight" in open_weights(folder).tensors
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ControlNetModel"
    for path in (single, folder):
        read = built(TINY, f"{EDGES}.weights={path}").task.first_params(weights.params, {})
        jax.tree.map(np.testing.assert_array_equal, read, weights.params)
    (folder / "config.json").write_text('{"controlnet_conditioning_channel_order": "bgr"}')
    with pytest.raises(ValueError, match="channel_order = 'bgr' should be 'rgb'"):
        built(TINY, f"{EDGES}.weights={folder}").task.first_params(weights.params, {})


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (TINY, [f"{EDGES}.hint=cany"], "config.control.edges.hint = 'cany' should be"),
        (TINY, [f"{EDGES}.wieghts=x"], "config.control.edges.wieghts = 'x' is not an option"),
        (TINY, ["--config.adapters.rank=2"], "config.adapters cannot be trained together with con"),
        (TINY, ["--config.control={}"], "config.control = {} should name a ControlNet"),
        (
            "configs/dit_emoji.py:tiny",
            [f"{EDGES}.hint=canny"],
            "config.control is for config.model",
        ),
        (
            "configs/svd.py:tiny",
            [f"{EDGES}.hint=canny"],
            "config.control is for networks of images",
        ),
        (
            TINY,
            ["--config.latent_cache.folder=x", "--config.data.batches.crop=center"],
            "config.latent_cache keeps no hints, which config.control reads",
        ),
    ],
)
def test_what_cannot_be_trained_is_told(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        built(path, *overrides)


def test_a_base_is_needed():
    with pytest.raises(ConfigError, match="ckpt_path is not set: config.control needs the weights"):
        built(TINY).task.check_sources()


def test_one_file_holds_one(tmp_path):
    experiment = built(TINY, "--config.control.depth.hint=canny")
    weights = trained(TINY, "--config.control.depth.hint=canny")
    with pytest.raises(
        ConfigError, match="edges, depth, and a file holds one ControlNet|depth, edg"
    ):
        experiment.task.export_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="no place for averages: leave --with_ema out"):
        built(TINY).task.export_file(trained(TINY), tmp_path / "x.safetensors")
