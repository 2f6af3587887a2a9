"""Activations stay with their samples on a mesh whose fsdp axis splits the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.devices.mesh import batch_sharding, make_mesh, on_mesh, replicated
from diffusion_jax.devices.partition import fsdp, tree_shardings
from diffusion_jax.devices.placement import by_sample
from diffusion_jax.models.layers import basic as layers
from diffusion_jax.models.layers import transformer


def gradient_program(mesh, x, params):
    module = transformer.FeedForward()

    def loss(params, x):
        return jnp.sum(module.apply({"params": params}, x, rngs={"dropout": key}) ** 2)

    key = jax.random.key(0)
    shardings = tree_shardings(mesh, params, [("", fsdp(min_size=2))])
    placed = jax.device_put((params, x), (shardings, batch_sharding(mesh)))
    gradient = jax.jit(on_mesh(mesh, jax.grad(loss)))
    return gradient(*placed), gradient.lower(*placed).compile().as_text(), jax.grad(loss)(params, x)


@pytest.mark.parametrize("kept", [True, False])
def test_nothing_is_sent_from_all_to_all(monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(layers, "by_sample", lambda x: x)
    mesh = make_mesh(data=1, fsdp=8)
    x = jax.random.normal(jax.random.key(1), (8, 4, 64))
    init = transformer.FeedForward().init(
        {"params": jax.random.key(2), "dropout": jax.random.key(3)}, x
    )
    found, program, expected = gradient_program(mesh, x, init["params"])
    assert ("all-to-all" in program) != kept
    for ours, alone in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-3)


def test_a_batch_that_does_not_divide_and_no_mesh_are_left_alone():
    x = jnp.ones((3, 4))
    assert by_sample(x) is x
    mesh = make_mesh(data=8)
    program = jax.jit(on_mesh(mesh, by_sample)).lower(x).as_text()
    assert "sharding_constraint" not in program


def test_the_batch_alone_is_split():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, PartitionSpec()))
    placed = jax.jit(on_mesh(mesh, by_sample))(x)
    assert placed.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_context_splits_frames_and_spares_what_has_none():
    """Eight frames lie on eight devices; four vectors on the four that split the batch."""
    mesh = make_mesh(data=2, fsdp=2, context=2)
    place = jax.jit(on_mesh(mesh, by_sample))
    whole = jax.device_put([jnp.ones((8, 4)), jnp.ones((4, 4))], replicated(mesh))
    frames, vectors = map(place, whole)
    assert frames.sharding.shard_shape((8, 4)) == (1, 4)
    assert vectors.sharding.shard_shape((4, 4)) == (1, 4)
    assert len({str(s.index) for s in vectors.addressable_shards}) == 4
