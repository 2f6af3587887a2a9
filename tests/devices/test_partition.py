"""Rules over paths say how leaves are split over a mesh."""

import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from diffusion_jax.devices import partition
from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.devices.partition import TRANSFORMER_SPLITS, fsdp, parallel, tree_shardings

PARAMS = {
    "conv_in": {"kernel": jnp.zeros((3, 3, 4, 32)), "bias": jnp.zeros((32,))},
    "out": {"kernel": jnp.zeros((32, 6))},
}


@pytest.fixture(autouse=True)
def fresh_warnings():
    partition._warn_once.cache_clear()


def specs(mesh, tree, rules):
    return jax.tree.map(lambda s: s.spec, tree_shardings(mesh, tree, rules))


def test_first_matching_rule_decides_and_the_rest_is_replicated():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = [
        ("conv_in/kernel$", (None, None, None, ("fsdp", "tensor"))),
        ("kernel$", ("tensor", "fsdp")),
    ]
    assert specs(mesh, PARAMS, rules) == {
        "conv_in": {
            "kernel": PartitionSpec(None, None, None, ("fsdp", "tensor")),
            "bias": PartitionSpec(),
        },
        "out": {"kernel": PartitionSpec("tensor", "fsdp")},
    }


def test_optimizer_state_follows_the_parameters():
    mesh = make_mesh(data=1, fsdp=8)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(tx.init, PARAMS)
    placed = specs(mesh, {"opt_state": state}, [("conv_in/kernel$", (None, None, None, "fsdp"))])
    adam = placed["opt_state"][1][0]
    for moments in (adam.mu, adam.nu):
        assert moments["conv_in"]["kernel"] == PartitionSpec(None, None, None, "fsdp")
        assert moments["conv_in"]["bias"] == PartitionSpec()
    assert adam.count == PartitionSpec()
    # field names and indices are part of the path
    specs(mesh, {"opt_state": state}, [("^opt_state/1/0/mu/out/kernel$", ("fsdp",))])


def test_rule_that_matches_nothing():
    with pytest.raises(
        ValueError, match="'attn/qkv' should match one of the 3 paths, such as conv_in/bias"
    ):
        tree_shardings(make_mesh(), PARAMS, [("attn/qkv", ("fsdp",))])
    # one that is only shadowed by an earlier rule does match
    tree_shardings(make_mesh(), PARAMS, [(".*", ()), ("kernel", ("fsdp",))])


def test_bad_axes():
    with pytest.raises(
        ValueError, match="'kernel': mesh axis 'model' is unknown; choose from slices, data"
    ):
        tree_shardings(make_mesh(), PARAMS, [("kernel", ("model",))])
    with pytest.raises(ValueError, match="should use a mesh axis once: fsdp, fsdp"):
        tree_shardings(make_mesh(), PARAMS, [("kernel", ("fsdp", "fsdp"))])
    with pytest.raises(ValueError, match=r"fsdp\(axis='model'\): mesh axis 'model' is unknown"):
        tree_shardings(make_mesh(), PARAMS, [("kernel", fsdp(axis="model"))])


def test_dimension_that_does_not_divide_is_replicated_with_one_warning(caplog):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    rules = [("out/kernel", (("tensor",), "fsdp")), ("bias", (None, "fsdp"))]
    with caplog.at_level(logging.WARNING):
        placed = specs(mesh, PARAMS, rules)
        specs(mesh, PARAMS, rules)
    assert placed["out"]["kernel"] == PartitionSpec("tensor", None)
    assert placed["conv_in"]["bias"] == PartitionSpec()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any("out/kernel: dimension 1 of shape (32, 6)" in text for text in messages)
    assert any("conv_in/bias: shape (32,) has fewer dimensions" in text for text in messages)


def test_fsdp_splits_the_largest_dividing_dimension(caplog):
    mesh = make_mesh(data=1, fsdp=8)
    tree = {
        "large": jnp.zeros((3, 3, 64, 32)),
        "equal": jnp.zeros((64, 64)),
        "odd": jnp.zeros((63, 16)),
        "small": jnp.zeros((8, 8)),
        "none": jnp.zeros((9, 15)),
        "scalar": jnp.zeros(()),
    }
    with caplog.at_level(logging.WARNING):
        placed = specs(mesh, tree, [(".*", fsdp(min_size=100))])
    assert placed == {
        "large": PartitionSpec(None, None, "fsdp", None),
        "equal": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "small": PartitionSpec(),
        "none": PartitionSpec(None, None),
        "scalar": PartitionSpec(),
    }
    assert [
        "none: no dimension of shape (9, 15)" in record.getMessage() for record in caplog.records
    ] == [True]
    everything = specs(make_mesh(), tree, [(".*", fsdp(min_size=1))])
    assert set(everything.values()) == {PartitionSpec()}


def heads_of_16(path, width):
    return width // 16


def test_tensor_splits_layers_and_fsdp_the_rest(caplog):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    leaves = {
        "attn1": {
            "to_q": {"kernel": (64, 64)},
            "to_out_0": {"kernel": (64, 64), "bias": (64,)},
        },
        "attn2": {"to_k": {"kernel": (63, 48)}},  # three heads
        "ff": {
            "net_0": {"proj": {"kernel": (64, 512), "bias": (512,)}},
            "net_2": {"kernel": (256, 65)},
        },
        "proj_out": {"kernel": (64, 64)},
        "odd": {"ff": {"net_2": {"kernel": (255, 64)}}},
    }
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        leaves,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    rules = [("", parallel(TRANSFORMER_SPLITS, heads_of_16, min_size=1000))]
    tree = {"block": shapes}
    with caplog.at_level(logging.WARNING):
        placed = specs(mesh, tree, rules)["block"]
    assert placed["attn1"]["to_q"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert placed["attn1"]["to_out_0"]["kernel"] == PartitionSpec("tensor", "fsdp")
    assert placed["attn1"]["to_out_0"]["bias"] == PartitionSpec()
    assert placed["attn2"]["to_k"]["kernel"] == PartitionSpec(None, "fsdp")
    assert placed["ff"]["net_0"]["proj"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert placed["ff"]["net_0"]["proj"]["bias"] == PartitionSpec("tensor")
    assert placed["ff"]["net_2"]["kernel"] == PartitionSpec(("tensor", "fsdp"), None)
    assert placed["proj_out"]["kernel"] == PartitionSpec(None, "fsdp")
    assert placed["odd"]["ff"]["net_2"]["kernel"] == PartitionSpec(None, "fsdp")
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert "255 features of layers like /ff/net_2/kernel$ do not divide by the 2" in messages[0]
    assert "3 heads of layers like /to_[qkv]/kernel$ do not divide by the 2" in messages[1]
    # a mesh without that axis splits nothing over it, and says nothing
    placed = specs(make_mesh(data=4, fsdp=2), tree, rules)["block"]
    assert placed["attn1"]["to_q"]["kernel"] == PartitionSpec(None, "fsdp")
    assert len(caplog.records) == 2


def test_the_depth_of_a_stack_is_never_split():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    rules = [("", parallel(TRANSFORMER_SPLITS, heads_of_16, min_size=1))]
    stack = {"attn1": {"to_q": {"kernel": jnp.zeros((8, 4, 32))}}, "norm1": jnp.zeros((8, 6))}
    for name in ("transformer_blocks", "blocks"):
        placed = specs(mesh, {"x": {name: stack}}, rules)["x"][name]
        assert placed["attn1"]["to_q"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
        assert placed["norm1"] == PartitionSpec(None, None)
    alone = specs(mesh, {"x": {"transformer_blocks_0": stack}}, rules)["x"]
    assert alone["transformer_blocks_0"]["norm1"] == PartitionSpec("fsdp", None)


def test_factored_moments_of_a_split_kernel_are_not_kernels(caplog):
    mesh = make_mesh(data=4, tensor=2)
    rules = [("", parallel(TRANSFORMER_SPLITS, heads_of_16))]
    rows = {"v_row": {"ff": {"net_2": {"kernel": jnp.zeros((64,))}}}}
    with caplog.at_level(logging.WARNING):
        assert specs(mesh, rows, rules)["v_row"]["ff"]["net_2"]["kernel"] == PartitionSpec()
    assert "v_row/ff/net_2/kernel: shape (64,) is no kernel's" in caplog.text


def test_shardings_work_under_set_mesh():
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        place = tree_shardings(mesh, PARAMS, [("kernel", fsdp(min_size=1))])
        placed = jax.jit(lambda: PARAMS, out_shardings=place)()
    assert placed["conv_in"]["kernel"].sharding.spec == PartitionSpec(None, None, None, "fsdp")
