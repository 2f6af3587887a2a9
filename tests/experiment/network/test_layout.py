"""One loss curve on every mesh, each device holding its share and no more."""

import logging
import math

import jax
import numpy as np
import pytest

from diffusion_jax.devices import partition as sharding
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.network import layout
from diffusion_jax.train.step import jit_train_step

STEPS = 3
# Two transformer blocks in one stack, in the middle of the network.
TRANSFORMER = (
    "--config.model.use_spatial_transformer=True",
    "--config.model.transformer_depth=2",
    "--config.model.scan=True",
)


@pytest.fixture(autouse=True)
def split_small_leaves(monkeypatch):
    monkeypatch.setattr(layout, "MIN_SIZE", 1024)
    sharding._warn_once.cache_clear()


def build(config, *overrides, **mesh):
    sizes = {"data": 1} | mesh
    overrides = [*overrides, *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())]
    devices = jax.devices()[: math.prod(sizes.values())]
    return make_experiment(load_config(config, overrides), devices=devices)


def host_batch(step):
    generator = np.random.default_rng(step)
    return {
        "image": generator.uniform(-1, 1, (8, 28, 28, 1)).astype(np.float32),
        "label": generator.integers(0, 10, 8).astype(np.int32),
    }


def train(built):
    """Train a few steps -> (losses, bytes of arguments per device, bytes by arithmetic)."""
    state, frozen, found = built.init_state(), built.random_frozen(), []
    batch = built.to_devices(host_batch(0))
    step_fn = jit_train_step(built.train_step, built.abstract_state())
    compiled = step_fn.lower(state, batch, frozen).compile()
    expected = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state, batch, frozen))
    )
    for step in range(STEPS):
        state, metrics = compiled(state, built.to_devices(host_batch(step)), frozen)
        found.append(float(metrics["loss"]))
    return np.array(found), compiled.memory_analysis().argument_size_in_bytes, expected


@pytest.fixture(scope="module")
def one_device():
    return train(build("configs/mnist.py:tiny", *TRANSFORMER))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        ({"data": 8}, 1.0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0.5),
        ({"fsdp": 8}, 0.15),
        ({"tensor": 4}, 0.9),
        ({"slices": 2, "fsdp": 2, "tensor": 2}, 0.5),
    ],
)
def test_every_mesh_trains_like_one_device(one_device, mesh, share):
    losses, arguments, expected = train(build("configs/mnist.py:tiny", *TRANSFORMER, **mesh))
    np.testing.assert_allclose(losses, one_device[0], rtol=2e-5)
    # A table of the schedule that the loss does not read is dropped everywhere.
    assert expected - arguments == one_device[2] - one_device[1]
    assert arguments < share * one_device[1]


def specs(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.sharding.spec)
        for path, leaf in leaves
    }


def test_moments_and_average_lie_where_their_parameter_does():
    built = build("configs/mnist.py:tiny", *TRANSFORMER, fsdp=2, tensor=4)
    placed = specs(built.abstract_state())
    params = {path: spec for path, spec in placed.items() if path.startswith("params/")}
    for prefix in ("optimizer/0/mu/", "optimizer/0/nu/", "ema/params/"):
        for path, spec in params.items():
            assert placed[f"opt_state/{prefix}{path.removeprefix('params/')}"] == spec, path
    block = "params/network/middle_block_1/transformer_blocks/"
    assert params[f"{block}attn1/to_q/kernel"] == (None, "fsdp", "tensor")
    assert params[f"{block}ff/net_2/kernel"] == (None, "tensor", "fsdp")
    assert params["params/network/middle_block_0/in_layers_2/kernel"][-1] == "fsdp"
    large = [path for path, leaf in sizes(built).items() if leaf >= 1024]
    assert large and all("fsdp" in str(params[path]) for path in large)


def sizes(built):
    leaves = jax.tree_util.tree_flatten_with_path({"params": built.abstract_state().params})[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.size for p, leaf in leaves}


@pytest.mark.slow
def test_frozen_encoders_and_heads_that_do_not_divide(caplog):
    with caplog.at_level(logging.WARNING):
        built = build("configs/sdxl.py:tiny", fsdp=2, tensor=4)  # encoders of two heads
        frozen, placed = specs(built.abstract_frozen()), specs(built.abstract_state())
    layer = "conditioner/clip/encoder/layers_0/"
    assert frozen[f"{layer}mlp/fc1/kernel"] == ("fsdp", "tensor")
    assert frozen[f"{layer}mlp/fc2/kernel"] == ("tensor", "fsdp")
    assert "tensor" not in str(frozen[f"{layer}self_attn/q_proj/kernel"])
    assert "2 heads of layers like /self_attn/out_proj/kernel$ do not divide by" in caplog.text
    assert any(path.startswith("first_stage/") and "fsdp" in str(s) for path, s in frozen.items())
    block = "params/network/output_blocks_0_1/transformer_blocks/"  # two scanned, four heads of 16
    assert placed[f"{block}attn2/to_k/kernel"] == (None, "fsdp", "tensor")
    assert placed[f"{block}attn2/to_out_0/kernel"] == (None, "tensor", "fsdp")
    two = specs(build("configs/sdxl.py:tiny", tensor=2).abstract_frozen())
    assert two[f"{layer}self_attn/q_proj/bias"] == ("tensor",)
    assert two[f"{layer}self_attn/out_proj/kernel"] == ("tensor", None)


def test_attention_blocks_are_split_by_head_in_the_legacy_order_only():
    placed = specs(build("configs/mnist.py:tiny", tensor=4).abstract_state())
    block = "params/network/middle_block_1/"
    assert placed[f"{block}qkv/kernel"] == (None, None, "tensor")
    assert placed[f"{block}proj_out/kernel"] == (None, "tensor", None)
    order = "--config.model.use_new_attention_order=True"
    with pytest.raises(ValueError, match="config.mesh.tensor = 4 splits no layer"):
        build("configs/mnist.py:tiny", order, tensor=4)
    with pytest.raises(ValueError, match="config.mesh.tensor = 8 splits no layer"):
        build("configs/mnist.py:tiny", tensor=8)
