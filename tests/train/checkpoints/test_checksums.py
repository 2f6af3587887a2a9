import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.checkpoints import checksums as module
from diffusion_jax.train.checkpoints.checksums import checksums

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_]


def array(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape, scale=50).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_numpy_and_the_devices_agree(dtype, shape):
    x = array(shape, dtype)
    on_device = int(module._on_devices(jnp.asarray(x)))
    assert checksums({"x": x}) == {"x": on_device} == checksums({"x": jnp.asarray(x)})


@pytest.mark.parametrize("spec", [("a", None), (None, "b"), ("a", "b"), ("b", "a"), (("a", "b"),)])
def test_sharding_changes_nothing(spec):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    x = array((8, 16), np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums([sharded]) == checksums([x])


def test_every_flipped_bit_is_seen():
    x = array((5, 3), np.float32)
    before = checksums([x])
    for position in range(x.nbytes):
        for bit in range(8):
            raw = bytearray(x.tobytes())
            raw[position] ^= 1 << bit
            flipped = np.frombuffer(bytes(raw), np.float32).reshape(x.shape)
            assert checksums([flipped]) != before


def test_swapped_values_and_other_shapes_of_zeros():
    x = array((64,), np.float32)
    swapped = x.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert checksums([swapped]) != checksums([x])


def test_64_bit_values():
    x = array((3, 4), np.float64)
    y = x.copy()
    y[1, 2] = np.nextafter(y[1, 2], 1e9)
    assert checksums([x]) != checksums([y])


def test_names_are_paths():
    tree = {"params": {"a": np.zeros(2), "b": (np.zeros(1), np.zeros(1))}}
    assert set(checksums(tree)) == {"params/a", "params/b/0", "params/b/1"}
