"""Bytes on one device, counted by hand from shapes and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.plan.memory import Held, device_bytes, held_bytes, read_bytes
from diffusion_jax.train.ema import EmaState
from diffusion_jax.train.power_ema import PowerEmaState
from diffusion_jax.train.state import TrainState

MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


def leaf(*shape, dtype=jnp.float32, spec=()):
    sharding = NamedSharding(MESH, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_a_split_array_counts_for_the_part_of_one_device():
    assert device_bytes({"a": leaf(8, 6)}) == 4 * 8 * 6
    assert device_bytes({"a": leaf(8, 6, spec=("fsdp",))}) == 4 * 4 * 6
    assert device_bytes([leaf(8, 6, dtype=jnp.bfloat16, spec=(("data", "fsdp"),))]) == 2 * 2 * 6


def test_the_average_is_not_counted_with_the_moments():
    params = {"w": leaf(8, 6, spec=("fsdp",))}
    state = TrainState(
        step=leaf(dtype=jnp.int32),
        params=params,
        opt_state=({"m": leaf(8, 6), "count": leaf(dtype=jnp.int32)}, EmaState(leaf(), params)),
        mutable={"mean": leaf(3)},
    )
    batch, frozen = {"image": leaf(4, 2, spec=("data",))}, {"vae": leaf(5, dtype=jnp.bfloat16)}
    assert held_bytes((state, batch, frozen)) == Held(
        parameters=96, moments=192 + 4 + 4, ema=96, other=4 + 12, frozen=10, batch=16
    )


def test_averages_of_any_length_are_averages():
    params = {"w": leaf(8, 6, spec=("fsdp",))}
    averages = (EmaState(leaf(), params), PowerEmaState(leaf(), (params, params)))
    held = held_bytes((TrainState(leaf(), params, averages, {}), {}, {}))
    assert (held.ema, held.moments) == (3 * 96, 8)


def test_only_what_is_used_is_read():
    arguments = ({"a": leaf(2), "b": leaf(3)}, leaf(4), leaf(5))
    assert read_bytes(arguments, (True, False, True, True)) == 4 * (2 + 4 + 5)
