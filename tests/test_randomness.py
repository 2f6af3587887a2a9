"""Streams of one seed that never meet, and noise that belongs to a sample."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.randomness import (
    SamplerStream,
    Stream,
    fold_in_all,
    noise_like,
    sample_keys,
    seed_key,
    step_key,
    stream_key,
)


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_reserved_streams_are_those_that_runs_were_made_with():
    # A run that goes on, or is compared with an older one, needs the numbers of old.
    assert {stream.name: 2**32 - stream for stream in Stream} == {
        "EVALUATION": 1,
        "INITIALISATION": 2,
        "LOGGED_SAMPLES": 3,
        "LOGGED_DIFFUSION": 4,
        "LATENT_SCALE": 5,
        "LIKELIHOOD": 6,
        "SCORED_SAMPLES": 7,
        "LEVELS": 8,
        "PRIOR_IMAGES": 9,
    }
    assert {stream.name: 2**32 - stream for stream in SamplerStream} == {
        "INITIAL_NOISE": 1,
        "BEFORE_STEP": 2,
        "CONDITIONING_FRAME": 3,
    }


@pytest.mark.parametrize("seed", [0, 7])
def test_no_two_streams_nor_steps_share_a_key_or_a_child(seed):
    keys = [stream_key(seed, stream) for stream in Stream]
    keys += [step_key(seed, jnp.int32(step)) for step in range(5)]
    children = itertools.chain.from_iterable(sample_keys(key, jnp.arange(8)) for key in keys)
    found = [bits(key) for key in [*keys, *children]]
    assert len(set(found)) == len(found) == (len(Stream) + 5) * 9
    assert bits(stream_key(seed, Stream.EVALUATION)) == bits(
        jax.random.fold_in(jax.random.key(seed), np.uint32(0xFFFFFFFF))
    )


def test_the_key_of_a_sample_is_a_matter_of_its_position_alone():
    key = jax.random.key(3)
    whole = sample_keys(key, jnp.arange(6))
    assert [bits(k) for k in sample_keys(key, jnp.array([4, 1]))] == [
        bits(whole[4]),
        bits(whole[1]),
    ]
    assert bits(whole[2]) == bits(jax.random.fold_in(key, 2))


def test_folding_takes_every_uint32_and_traced_numbers():
    keys = sample_keys(jax.random.key(0), jnp.arange(3))
    last = fold_in_all(keys, SamplerStream.INITIAL_NOISE)
    assert [bits(k) for k in last] == [
        bits(jax.random.fold_in(key, np.uint32(2**32 - 1))) for key in keys
    ]
    traced = jax.jit(fold_in_all)(keys, jnp.int32(5))
    assert [bits(k) for k in traced] == [bits(k) for k in fold_in_all(keys, 5)]


def test_noise_is_normal_float32_and_belongs_to_its_key():
    noise = noise_like(sample_keys(jax.random.key(1), jnp.arange(4)), (40, 50, 1))
    assert noise.shape == (4, 40, 50, 1) and noise.dtype == jnp.float32
    rows = np.asarray(noise).reshape(4, -1)
    assert np.abs(rows.mean(1)).max() < 0.1 and np.abs(rows.std(1) - 1).max() < 0.1
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.1
    last = noise_like(sample_keys(jax.random.key(1), jnp.array([3])), (40, 50, 1))
    np.testing.assert_array_equal(last[0], noise[3])


def test_any_integer_is_a_seed_of_its_own():
    seeds = [
        0,
        1,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**33,
        2**64,
        2**64 + 1,
        -1,
        -2,
        1 - 2**32,
        -(2**64),
    ]
    assert len({bits(seed_key(seed)) for seed in seeds}) == len(seeds)
    for seed in (0, 7, 2**32 - 1):
        assert bits(seed_key(seed)) == bits(jax.random.key(seed))
