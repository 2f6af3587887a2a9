"""One trajectory whatever the devices and micro-batches, one compilation, exact resume."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compilations import times_compiled

from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import make_mesh, replicated
from diffusion_jax.devices.partition import fsdp
from diffusion_jax.train.ema import ema
from diffusion_jax.train.state import abstract_state, init_sharded, init_state
from diffusion_jax.train.step import jit_train_step, make_eval_step, make_train_step, mean_metrics

BATCH = 16


class Net(nn.Module):
    """Two convolutions around a GroupNorm, in the size of a thumbnail."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.silu(nn.GroupNorm(num_groups=4)(x))
        return nn.Conv(1, (3, 3))(x)


NET = Net()
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), ema(0.99))


def loss_fn(params, mutable, frozen, batch, keys, *, train):
    """Denoising with one noise per sample; counts its calls in `mutable` while it trains."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys)
    out = NET.apply({"params": params}, batch["image"] + frozen["sigma"] * noise)
    losses = jnp.mean((out - noise) ** 2, axis=(1, 2, 3))
    weight = batch["weight"] if "weight" in batch else jnp.ones_like(losses)
    loss = jnp.sum(weight * losses) / jnp.sum(weight)
    if train:
        mutable = {"count": mutable["count"] + 1.0}
    return loss, ({"loss_simple": loss}, mutable)


@jax.jit
def init():
    params = NET.init(jax.random.key(7), jnp.zeros((1, 8, 8, 1)))["params"]
    return init_state(params, TX, {"count": jnp.zeros(())})


def host_batch(step):
    return {
        "image": np.random.default_rng(step).normal(size=(BATCH, 8, 8, 1)).astype(np.float32),
        "caption": np.array(["x"] * BATCH, object),
    }


def run(mesh, rules=(), *, num_steps=5, accumulate=1, tx=TX, state=None):
    """The losses of some steps, and the state after them."""
    state = init_sharded(init, mesh, rules) if state is None else state
    step = jit_train_step(make_train_step(loss_fn, tx, seed=3, accumulate=accumulate), state)
    frozen = jax.device_put({"sigma": jnp.float32(0.5)}, replicated(mesh))
    losses, before = [], times_compiled("train_step")
    for number in range(int(state.step), int(state.step) + num_steps):
        state, metrics = step(state, shard_batch(mesh, host_batch(number)), frozen)
        losses.append(float(metrics["loss"]))
    assert times_compiled("train_step") == before + 1
    return np.array(losses), state


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def reference():
    return run(one_device())


@pytest.mark.parametrize(
    ("data", "fsdp_size", "accumulate"),
    [(2, 1, 1), (1, 4, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)],
)
def test_one_trajectory_on_any_mesh(reference, data, fsdp_size, accumulate):
    devices = jax.devices()[: data * fsdp_size]
    mesh = make_mesh(data=data, fsdp=fsdp_size, devices=devices)
    rules = [(".*", fsdp(min_size=64))]
    losses, state = run(mesh, rules, accumulate=accumulate)
    expected, expected_state = reference
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    kernel = state.params["Conv_0"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp_size == 1)
    # Adam divides by the root of the second moment, which magnifies rounding where a gradient is
    # near zero
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        state.params,
        expected_state.params,
    )


def test_one_trajectory_under_set_mesh(reference):
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        losses, _ = run(mesh, [(".*", fsdp(min_size=64))])
    np.testing.assert_allclose(losses, reference[0], rtol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_reads_rounded_parameters_and_the_state_stays_exact(accumulate):
    def loss(params, mutable, frozen, batch, keys, *, train):
        dtypes.add(params["w"].dtype)
        return jnp.mean(batch["x"] @ params["w"].astype(jnp.float32)), ({}, mutable)

    dtypes, w = set(), jnp.full((3, 1), 1.0 + 2**-10)
    state = init_state({"w": w}, optax.sgd(0.5))
    half = lambda params: {"w": params["w"].astype(jnp.bfloat16)}
    step = make_train_step(loss, optax.sgd(0.5), seed=0, accumulate=accumulate, rounded=half)
    x = jnp.arange(12.0).reshape(4, 3)
    new, metrics = jax.jit(step)(state, {"x": x}, {})
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert float(metrics["loss"]) == x.sum() / 4  # of the rounded 1
    assert new.params["w"].dtype == jnp.float32
    np.testing.assert_array_equal(new.params["w"], w - 0.5 * x.mean(0)[:, None])


@pytest.mark.parametrize(("accumulate", "weighted"), [(2, True), (4, False)])
def test_accumulated_gradient_equals_the_full_one(accumulate, weighted):
    tx = optax.sgd(1.0)
    state = init_state(init().params, tx, {"count": jnp.zeros(())})
    batch = {"image": jnp.asarray(host_batch(0)["image"])}
    if weighted:
        batch["weight"] = jnp.arange(BATCH, dtype=jnp.float32)
    frozen = {"sigma": jnp.float32(0.5)}
    full, full_metrics = jax.jit(make_train_step(loss_fn, tx, seed=3))(state, batch, frozen)
    step = jax.jit(make_train_step(loss_fn, tx, seed=3, accumulate=accumulate))
    parts, metrics = step(state, batch, frozen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        parts.params,
        full.params,
    )
    for name in full_metrics:
        np.testing.assert_allclose(metrics[name], full_metrics[name], rtol=1e-5)
    assert float(parts.mutable["count"]) == accumulate and float(full.mutable["count"]) == 1


def test_micro_batches_stay_on_their_devices():
    """Splitting the batch moves no images: the compiled step only sums over devices."""
    mesh = make_mesh(data=8)
    state = abstract_state(init, mesh)
    batch = shard_batch(mesh, host_batch(0))
    frozen = {"sigma": jnp.float32(0.5)}
    step = jit_train_step(make_train_step(loss_fn, TX, seed=0, accumulate=2), state)
    text = step.lower(state, batch, frozen).compile().as_text()
    assert "all-reduce" in text
    for collective in ("all-gather(", "all-to-all(", "collective-permute("):
        assert collective not in text


def test_state_and_metrics():
    state = init()
    step = jax.jit(make_train_step(loss_fn, TX, seed=3))
    frozen = {"sigma": jnp.float32(0.5)}
    new, metrics = step(state, {"image": jnp.asarray(host_batch(0)["image"])}, frozen)
    assert int(new.step) == 1
    assert set(metrics) == {"loss", "loss_simple", "grad_norm"}
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())
    assert float(metrics["grad_norm"]) > 0
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_traced_once_per_batch_shape():
    traces = []

    def counting(*args, train):
        traces.append(train)
        loss, (metrics, mutable) = loss_fn(*args, train=train)
        # weak and low-precision outputs must not change the types of the state
        return loss, (metrics | {"one": 1.0}, {"count": mutable["count"].astype(jnp.bfloat16)})

    for accumulate in (1, 2):
        traces.clear()
        mesh = one_device()
        state = init_sharded(init, mesh)
        step = make_train_step(counting, TX, seed=0, accumulate=accumulate)
        step = jit_train_step(step, state)
        for number in range(3):
            batch = shard_batch(mesh, host_batch(number))
            state, _ = step(state, batch, {"sigma": jnp.float32(0.5)})
        assert len(traces) == 1
        assert state.mutable["count"].dtype == jnp.float32


def test_donation():
    mesh = make_mesh(data=2, fsdp=4)
    state = init_sharded(init, mesh, [(".*", fsdp(min_size=64))])
    batch, frozen = shard_batch(mesh, host_batch(0)), {"sigma": jnp.float32(0.5)}
    step = jit_train_step(make_train_step(loss_fn, TX, seed=0), state, donate=False)
    kept, _ = step(state, batch, frozen)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jit_train_step(make_train_step(loss_fn, TX, seed=0), kept)(kept, batch, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    assert not batch["image"].is_deleted() and not frozen["sigma"].is_deleted()


def test_resumed_state_repeats_the_run_bit_by_bit():
    mesh = make_mesh(data=4, fsdp=2)
    rules = [(".*", fsdp(min_size=64))]
    whole, end = run(mesh, rules, num_steps=6)
    first, middle = run(mesh, rules, num_steps=3)
    saved = jax.tree.map(np.asarray, middle)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh, rules))
    second, resumed = run(mesh, num_steps=3, state=jax.device_put(saved, shardings))
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, end)


def test_noise_depends_on_seed_step_and_position():
    def keys_of(seed, step, size, accumulate=1):
        seen = []

        def spy(params, mutable, frozen, batch, keys, *, train):
            noise = jax.vmap(jax.random.uniform)(keys)
            jax.debug.callback(lambda n: seen.append(np.asarray(n)), noise, ordered=True)
            return jnp.sum(params["w"]), ({}, mutable)

        tx = optax.sgd(0.0)
        state = init_state({"w": jnp.zeros(2)}, tx)._replace(step=jnp.int32(step))
        run_step = make_train_step(spy, tx, seed=seed, accumulate=accumulate)
        jax.block_until_ready(jax.jit(run_step)(state, {"image": jnp.zeros((size, 1))}, {}))
        jax.effects_barrier()
        return np.stack(seen, axis=1).reshape(-1)  # strided micro-batches interleave

    base = keys_of(0, 5, 8)
    assert len(set(base.tolist())) == 8
    np.testing.assert_array_equal(keys_of(0, 5, 4), base[:4])
    np.testing.assert_array_equal(keys_of(0, 5, 8, accumulate=4), base)
    assert not set(base) & set(keys_of(0, 6, 8)) and not set(base) & set(keys_of(1, 5, 8))
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 5), 2)
    assert base[2] == np.asarray(jax.random.uniform(expected))


def test_eval_of_a_padded_set_equals_the_mean_over_its_samples():
    state, frozen = init(), {"sigma": jnp.float32(0.5)}
    step, before = jax.jit(make_eval_step(loss_fn, seed=0)), times_compiled("eval_step")
    image = jnp.asarray(host_batch(0)["image"])
    valid = jnp.arange(BATCH) < 5
    padded = jnp.where(valid[:, None, None, None], image, 1e3)
    full = {"image": image, "weight": jnp.ones((BATCH,))}
    last = {"image": padded, "weight": valid.astype(jnp.float32)}
    metrics = [
        step(state.params, state.mutable, frozen, batch, number)
        for number, batch in enumerate([full, last])
    ]
    assert [float(m["weight"]) for m in metrics] == [BATCH, 5]
    single = [
        step(state.params, state.mutable, frozen, batch | {"weight": one}, number)["loss"]
        for number, (batch, count) in enumerate([(full, BATCH), (last, 5)])
        for one in jnp.eye(BATCH)[:count]
    ]
    means = mean_metrics(metrics)
    assert set(means) == {"loss", "loss_simple"}
    np.testing.assert_allclose(means["loss"], np.mean(single), rtol=1e-6)
    assert times_compiled("eval_step") == before + 1


def test_eval_noise_is_fixed_and_not_that_of_training():
    def noise_loss(params, mutable, frozen, batch, keys, *, train):
        noise = jnp.mean(jax.vmap(jax.random.normal)(keys))
        return noise + 0.0 * jnp.sum(params["w"]), ({}, mutable)

    tx = optax.sgd(0.1)
    state = init_state({"w": jnp.zeros(1)}, tx)
    batch = {"image": jnp.zeros((4, 1))}
    step = make_eval_step(noise_loss, seed=0)
    once = step(state.params, {}, {}, batch, 0)
    assert float(once["weight"]) == 4
    np.testing.assert_array_equal(step(state.params, {}, {}, batch, 0)["loss"], once["loss"])
    assert float(step(state.params, {}, {}, batch, 1)["loss"]) != float(once["loss"])
    _, metrics = make_train_step(noise_loss, tx, seed=0)(state, batch, {})
    assert float(metrics["loss"]) != float(once["loss"])


def test_bfloat16_parameters_keep_their_type():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init().params)
    before = jax.jit(lambda p: init_state(p, TX, {"count": jnp.zeros(())}))(params)
    for accumulate in (1, 2):
        step = jax.jit(make_train_step(loss_fn, TX, seed=0, accumulate=accumulate))
        batch = {"image": jnp.asarray(host_batch(0)["image"])}
        after, _ = step(before, batch, {"sigma": jnp.float32(0.5)})
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)


def test_bad_input():
    with pytest.raises(ValueError, match="accumulate = 0 should be at least 1"):
        make_train_step(loss_fn, TX, seed=0, accumulate=0)
    step = make_train_step(loss_fn, TX, seed=0, accumulate=3)
    with pytest.raises(ValueError, match="accumulate = 3 should divide the batch of 16"):
        step(init(), {"image": jnp.zeros((16, 8, 8, 1))}, {"sigma": jnp.float32(0.5)})
    with pytest.raises(ValueError, match="should have one leading axis, not"):
        step(init(), {"image": jnp.zeros((6, 8, 8, 1)), "label": jnp.zeros((3,))}, {})
    with pytest.raises(ValueError, match="0 eval batches"):
        mean_metrics([])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_samples_know_their_place_in_the_global_batch_and_the_step(accumulate):
    seen = []

    def spy(params, mutable, frozen, batch, keys, *, train):
        jax.debug.callback(
            lambda *arrays: seen.append([np.asarray(array) for array in arrays]),
            batch["image"][:, 0],
            batch["position"],
            batch["step"],
            ordered=True,
        )
        return jnp.sum(params["w"]), ({}, mutable)

    tx = optax.sgd(0.0)
    state = init_state({"w": jnp.zeros(2)}, tx)._replace(step=jnp.int32(3))
    run_step = jax.jit(make_train_step(spy, tx, seed=0, accumulate=accumulate))
    jax.block_until_ready(run_step(state, {"image": jnp.arange(8.0)[:, None]}, {}))
    jax.effects_barrier()
    assert len(seen) == accumulate
    for images, positions, steps in seen:
        np.testing.assert_array_equal(images, positions)
        assert np.all(steps == 3) and steps.shape == images.shape
