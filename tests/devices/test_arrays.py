"""Batches, and what every process has, become global arrays."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.devices.arrays import put, shard_batch
from diffusion_jax.devices.mesh import batch_sharding, make_mesh, replicated


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


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"batch\['image'\] has shape \(6, 2\).*divide by the 8"):
        shard_batch(make_mesh(), {"image": np.zeros((6, 2), np.float32)})
    with pytest.raises(ValueError, match=r"batch\['step'\] has shape \(\)"):
        shard_batch(make_mesh(), {"step": np.float32(1)})


def test_put_takes_numbers_and_keys():
    whole = replicated(make_mesh())
    key = jax.random.key(3)
    placed = put({"key": key, "x": np.arange(3.0), "n": 2}, whole)
    assert {leaf.sharding for leaf in placed.values()} == {whole}
    np.testing.assert_array_equal(placed["x"], [0, 1, 2])
    assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(key).tolist()


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
