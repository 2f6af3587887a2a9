"""Meshes, rules over paths, and batches that become global arrays."""

import dataclasses
import logging
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from diffusion_jax.devices import mesh
from diffusion_jax.devices import partition as sharding
from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import (
    batch_sharding,
    batch_shards,
    make_mesh,
    process_rows,
    replicated,
)
from diffusion_jax.devices.partition import TRANSFORMER_SPLITS, fsdp, parallel, tree_shardings

PARAMS = {
    "conv_in": {"kernel": jnp.zeros((3, 3, 4, 32)), "bias": jnp.zeros((32,))},
    "out": {"kernel": jnp.zeros((32, 6))},
}


@pytest.fixture(autouse=True)
def fresh_warnings():
    sharding._warn_once.cache_clear()


def specs(mesh, tree, rules):
    return jax.tree.map(lambda s: s.spec, tree_shardings(mesh, tree, rules))


def test_mesh_sizes_and_axis_types():
    mesh = make_mesh()
    assert mesh.axis_names == ("slices", "data", "fsdp", "tensor")
    assert mesh.devices.shape == (1, 8, 1, 1)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert make_mesh(fsdp=2, tensor=2).devices.shape == (1, 2, 2, 2)
    assert make_mesh(data=2, fsdp=-1).devices.shape == (1, 2, 4, 1)
    assert make_mesh(slices=2, fsdp=2).devices.shape == (2, 2, 2, 1)
    assert make_mesh(data=2, devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "slices=1 data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        ({"fsdp": 3}, "data=-1 fsdp=3 tensor=1 does not fit 8 devices"),
        ({"data": 0}, "mesh axis data=0 must be a positive number"),
        ({"data": -2}, "mesh axis data=-2 must be a positive number"),
        ({"fsdp": -1}, r"\['data', 'fsdp'\] are all -1"),
    ],
)
def test_bad_mesh(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the choice of a mesh reads of a TPU."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)


def test_slices_are_those_that_the_devices_name():
    chips = [Chip(i, slice_index=i // 4) for i in (4, 0, 5, 1, 6, 2, 7, 3)]
    arranged = mesh._arrange(chips, (2, 2, 2, 1))
    assert [{chip.slice_index for chip in part.flat} for part in arranged] == [{0}, {1}]
    assert {chip.id for chip in arranged.flat} == set(range(8))
    with pytest.raises(ValueError, match="slices=1 should be 2, the number of slices that the 8"):
        mesh._arrange(chips, (1, 4, 2, 1))
    with pytest.raises(ValueError, match="slices=4 should be 2"):
        mesh._arrange(chips, (4, 1, 2, 1))
    # GPUs name the group that is tied by NVLink; a mesh may well cross it
    gpus = [dataclasses.replace(chip, platform="gpu", device_kind="H100") for chip in chips]
    assert mesh._arrange(gpus, (1, 4, 2, 1)).shape == (1, 4, 2, 1)
    whole = make_mesh(slices=2, data=2, fsdp=2)
    np.testing.assert_array_equal(whole.devices.flat, jax.devices())


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
    with pytest.raises(ValueError, match="'attn/qkv' matches none of the 3 paths.*conv_in/bias"):
        tree_shardings(make_mesh(), PARAMS, [("attn/qkv", ("fsdp",))])
    # one that is only shadowed by an earlier rule does match
    tree_shardings(make_mesh(), PARAMS, [(".*", ()), ("kernel", ("fsdp",))])


def test_bad_axes():
    with pytest.raises(
        ValueError, match="'kernel' names the mesh axis 'model'; choose from slices, data"
    ):
        tree_shardings(make_mesh(), PARAMS, [("kernel", ("model",))])
    with pytest.raises(ValueError, match="uses a mesh axis twice: fsdp, fsdp"):
        tree_shardings(make_mesh(), PARAMS, [("kernel", ("fsdp", "fsdp"))])
    with pytest.raises(ValueError, match=r"fsdp\(axis='model'\) names the mesh axis 'model'"):
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
    placed = specs(mesh, {"x": {"transformer_blocks": stack}}, rules)["x"]["transformer_blocks"]
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


def test_replicated():
    array = jax.device_put(np.arange(3.0), replicated(make_mesh()))
    assert array.is_fully_replicated and len(array.addressable_shards) == 8


def test_shard_batch():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = {
        "image": np.arange(8 * 2, dtype=np.float32).reshape(8, 2),
        "label": np.arange(8, dtype=np.int32),
        "latent": np.zeros((8, 3), jnp.bfloat16),
        "valid": np.ones((8,), bool),
        "caption": np.array(["a"] * 8, object),
        "text": np.array(["b"] * 8),
    }
    arrays = shard_batch(mesh, batch)
    assert set(arrays) == {"image", "label", "latent", "valid"}
    np.testing.assert_array_equal(arrays["image"], batch["image"])
    assert arrays["image"].sharding == batch_sharding(mesh)
    assert arrays["image"].addressable_shards[0].data.shape == (2, 2)
    by_device = {s.device: s.data[0, 0] / 2 for s in arrays["image"].addressable_shards}
    first_rows = [by_device[device] for device in mesh.devices.flat]
    np.testing.assert_array_equal(first_rows, [0, 0, 2, 2, 4, 4, 6, 6])
    assert arrays["latent"].dtype == jnp.bfloat16 and arrays["label"].dtype == jnp.int32


def test_rows_of_this_process():
    mesh = make_mesh(slices=2, fsdp=2, tensor=2)
    assert batch_shards(mesh) == 4
    np.testing.assert_array_equal(process_rows(mesh, 8), np.arange(8))
    with pytest.raises(ValueError, match="a batch of 6 does not divide by the 4"):
        process_rows(mesh, 6)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"batch\['image'\] has shape \(6, 2\).*divide by the 8"):
        shard_batch(make_mesh(), {"image": np.zeros((6, 2), np.float32)})
    with pytest.raises(ValueError, match=r"batch\['step'\] has shape \(\)"):
        shard_batch(make_mesh(), {"step": np.float32(1)})


def test_shardings_work_under_set_mesh():
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        place = tree_shardings(mesh, PARAMS, [("kernel", fsdp(min_size=1))])
        placed = jax.jit(lambda: PARAMS, out_shardings=place)()
    assert placed["conv_in"]["kernel"].sharding.spec == PartitionSpec(None, None, None, "fsdp")


TWO_PROCESSES = textwrap.dedent("""
    import sys
    import jax
    import numpy as np
    jax.config.update("jax_num_cpu_devices", 4)
    rank, port = int(sys.argv[1]), sys.argv[2]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    from diffusion_jax.devices.arrays import shard_batch
    from diffusion_jax.devices.mesh import make_mesh
    from diffusion_jax.devices.partition import fsdp
    from diffusion_jax.train.optimizer import make_optimizer
    from diffusion_jax.train.state import init_sharded, init_state
    from diffusion_jax.train.step import jit_train_step, make_train_step
    import jax.numpy as jnp

    def loss_fn(params, mutable, frozen, batch, keys, *, train):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        loss = jnp.mean(((batch["x"] + noise) @ params["w"] - 1.0) ** 2)
        return loss, ({}, mutable)

    tx, _ = make_optimizer(learning_rate=1e-2)
    mesh = make_mesh(data=4, fsdp=2)
    init = lambda: init_state({"w": jnp.ones((4, 8))}, tx)
    state = init_sharded(init, mesh, [("w$", fsdp(min_size=1))])
    step = jit_train_step(make_train_step(loss_fn, tx, seed=0, accumulate=2), state)
    rows = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    for _ in range(3):
        count = 32 // jax.process_count()
        local = rows[rank * count : (rank + 1) * count]
        state, metrics = step(state, shard_batch(mesh, {"x": local}), {})
    print("LOSS", repr(float(metrics["loss"])))
""")


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, unused_port):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen([*command, str(rank), str(unused_port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    losses = [float(text.split("LOSS ")[1].split()[0]) for text in outputs]
    single = TWO_PROCESSES.replace("num_processes=2", "num_processes=1")
    script.write_text(single.replace('"jax_num_cpu_devices", 4', '"jax_num_cpu_devices", 8'))
    run = subprocess.run(
        [*command, "0", str(unused_port)], capture_output=True, text=True, timeout=300, check=True
    )
    expected = float(run.stdout.split("LOSS ")[1].split()[0])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
