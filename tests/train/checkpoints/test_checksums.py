"""Numbers that tell any change of an array, the same from NumPy, from devices and when sharded."""

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


@pytest.mark.parametrize("version", module.VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5), (0, 3), (5, 33000)])
def test_numpy_and_the_devices_agree(dtype, shape, version):
    x = array(shape, dtype)
    expected = {"x": int(module._on_devices(jnp.asarray(x), version))}
    assert checksums({"x": x}, version=version) == expected
    assert checksums({"x": jnp.asarray(x)}, version=version) == expected


def mix(x):
    """The last step of MurmurHash3, in Python integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def test_the_formulas_in_python_integers():
    x = array((3, 5), np.float32)
    words = [int(word) for word in x.view(np.uint32).flat]
    linear = sum(w * (2 * 1640531527 * i + 1) for i, w in enumerate(words)) % 2**32
    mixed = sum(mix(mix((i + 0x9E3779B9) % 2**32) ^ w) for i, w in enumerate(words)) % 2**32
    assert checksums([x], version=1) == {"0": linear}
    assert checksums([x]) == checksums([x], version=2) == {"0": mixed}


@pytest.mark.parametrize("version", module.VERSIONS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "spec", [(), ("a", None), (None, "b"), ("a", "b"), ("b", "a"), (("a", "b"),)]
)
def test_sharding_changes_nothing(spec, dtype, version):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    x = array((8, 16), dtype)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = checksums([x], version=version)
    assert checksums([sharded], version=version) == expected
    assert {"0": int(module._on_devices(sharded, version))} == expected


def of_bfloat16(shape, dtype=np.float32):
    """Values as in a bfloat16 file: the lower 16 bits of a float32 are 0."""
    return array(shape, ml_dtypes.bfloat16).astype(dtype)


def halves_swapped(x):
    first, second = np.split(x, 2)
    return np.concatenate([second, first])


def blocks_permuted(x):
    return np.concatenate([np.split(x, 4)[i] for i in (2, 0, 3, 1)])


# What a change of float32 values leaves of the linear sum: shifts by multiples of 2^15 places of
# values without lower bits, and 512 times the bits of 1.0 = 127 * 2^23.
CHANGES = {
    "halves swapped": (of_bfloat16((256, 256)), halves_swapped),
    "blocks permuted": (of_bfloat16((512, 256)), blocks_permuted),
    "ones for zeros": (np.zeros(512, np.float32), np.ones_like),
    "zeros for ones": (np.ones((64, 512), np.float32), np.zeros_like),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_a_linear_sum_does_not_see(change):
    x, altered = CHANGES[change]
    y = altered(x)
    assert not np.array_equal(x, y)
    assert checksums([x], version=1) == checksums([y], version=1)
    assert checksums([x]) != checksums([y])
    assert checksums([jnp.asarray(x)]) != checksums([jnp.asarray(y)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8])
@pytest.mark.parametrize("size", [2, 64, 2**12, 2**16])
def test_blocks_and_constants_of_every_dtype_are_told_apart(dtype, size):
    x = array((2 * size,), dtype)
    zeros = np.zeros(2 * size, dtype)
    ones = np.ones(2 * size, dtype)
    halves = [np.concatenate(pair) for pair in ((zeros[:size], ones[:size]),)]
    seen = [x, halves_swapped(x), x[::-1].copy(), zeros, ones, *halves, halves_swapped(halves[0])]
    assert len({checksums([y])["0"] for y in seen}) == len(seen)


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
