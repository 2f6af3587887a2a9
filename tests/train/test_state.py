"""Creation of the state: types, place on the mesh, numbers that do not depend on the mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.devices.partition import fsdp
from diffusion_jax.train.ema import ema
from diffusion_jax.train.state import (
    TrainState,
    abstract_state,
    init_sharded,
    init_state,
    owned,
    strengthen,
)

TX = optax.chain(optax.adamw(1e-3), ema(0.99))


def init(key):
    kernel_key, embedding_key = jax.random.split(key)
    params = {
        "dense": {"kernel": jax.random.normal(kernel_key, (8, 16)), "bias": jnp.full((16,), 0.5)},
        "embedding": jax.random.normal(embedding_key, (3, 5)),
    }
    return init_state(params, TX, {"batch_stats": {"mean": jnp.zeros((16,))}})


def test_initial_state():
    state = init(jax.random.key(0))
    assert state.step.dtype == jnp.int32 and state.step.shape == () and int(state.step) == 0
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert init_state({}, optax.sgd(0.1)).mutable == {}


def test_init_sharded_places_parameters_moments_and_average_alike():
    mesh = make_mesh(data=2, fsdp=4)
    state = init_sharded(init, mesh, [(".*", fsdp(min_size=32))], jax.random.key(0))
    assert isinstance(state, TrainState)
    adam, average = state.opt_state[0][0], state.opt_state[1]
    for tree in (state.params, adam.mu, adam.nu, average.params):
        kernel = tree["dense"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
        assert kernel.addressable_shards[0].data.shape == (8, 4)
        assert tree["dense"]["bias"].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated


def test_init_does_not_depend_on_the_mesh():
    expected = jax.jit(init)(jax.random.key(0))
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 8}):
        rules = [(".*", fsdp(min_size=8))]
        state = init_sharded(init, make_mesh(**sizes), rules, jax.random.key(0))
        # the normal quantile function rounds the last bit by the width of the loop it runs in
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, expected)


def test_abstract_state_is_what_init_makes():
    mesh, rules = make_mesh(fsdp=8), [("kernel$", (None, "fsdp"))]
    abstract = abstract_state(init, mesh, rules, jax.random.key(0))
    state = init_sharded(init, mesh, rules, jax.random.key(0))

    def same(expected, leaf):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert expected.sharding == leaf.sharding

    jax.tree.map(same, abstract, state)


def test_strengthen():
    weak = jax.jit(lambda: 1.0)()
    assert weak.weak_type and not strengthen(weak).weak_type
    assert strengthen(weak, jnp.zeros((), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_state_shares_no_memory_with_what_is_kept_nor_with_itself():
    frozen = {"kernel": jnp.arange(6.0).reshape(2, 3), "host": np.ones(2)}
    moved = jax.device_put(frozen["kernel"], frozen["kernel"].sharding)
    own, one = jnp.ones(3), jnp.zeros(4)
    state = {"moved": moved, "same": frozen["kernel"].astype(jnp.float32), "own": own}
    state |= {"one": one, "again": one, "none": jnp.zeros((0, 3))}
    found = owned(state, frozen)
    assert found["own"] is own and (found["one"] is one) != (found["again"] is one)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    step = jax.jit(lambda s, f: jax.tree.map(lambda x: x + f["kernel"][0, 1], s), donate_argnums=0)
    assert float(step(found, frozen)["same"][1, 2]) == 6.0
    np.testing.assert_array_equal(frozen["kernel"], np.arange(6.0).reshape(2, 3))


def test_copies_stay_where_they_are_split():
    mesh = make_mesh(fsdp=8)
    split = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("fsdp")))
    found = owned({"split": split}, {"also": split})["split"]
    assert found is not split and found.sharding == split.sharding
    assert owned({"split": split})["split"] is split
