"""Conditioning enters the network where its key says, and nothing is dropped in silence."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.routing import (
    CONDITIONING_KEYS,
    IMAGE_ONLY,
    network_inputs,
)

X = jnp.zeros((2, 4, 4, 3))
ENTRIES = {
    "concat": jnp.ones((2, 4, 4, 5)),
    "crossattn": jnp.full((2, 7, 8), 2.0),
    "vector": jnp.full((2, 6), 3.0),
}


@pytest.mark.parametrize("key", CONDITIONING_KEYS)
def test_every_key_routes_its_entries(key):
    needed = CONDITIONING_KEYS[key]
    inputs = network_inputs(key, X, {name: ENTRIES[name] for name in needed})
    if "concat" in needed:
        np.testing.assert_array_equal(inputs.x, jnp.concatenate([X, ENTRIES["concat"]], -1))
    else:
        assert inputs.x is X
    assert (inputs.context is not None) == ("crossattn" in needed)
    assert (inputs.y is not None) == ("vector" in needed)


def test_concat_takes_the_dtype_of_x():
    inputs = network_inputs("concat", X.astype(jnp.bfloat16), {"concat": ENTRIES["concat"]})
    assert inputs.x.dtype == jnp.bfloat16


def test_an_image_joins_every_frame_of_a_video():
    """The indicator of still images goes by on its way to the network."""
    clips = jnp.zeros((2, 3, 4, 4, 3))
    conditioning = {"concat": ENTRIES["concat"], IMAGE_ONLY: jnp.zeros((2, 3))}
    x = network_inputs("concat", clips, conditioning).x
    assert x.shape == (2, 3, 4, 4, 8) and float(x[:, :, ..., 3:].min()) == 1.0


@pytest.mark.parametrize(
    ("key", "entries", "message"),
    [
        ("adm", (), r"'adm' needs the entries \['vector'\], got \[\]"),
        ("none", ("vector",), r"'none' needs the entries \[\], got \['vector'\]"),
        ("hybrid", ("concat",), r"'hybrid' needs the entries \['concat', 'crossattn'\]"),
    ],
)
def test_missing_and_leftover_entries_are_errors(key, entries, message):
    with pytest.raises(ValueError, match=message):
        network_inputs(key, X, {name: ENTRIES[name] for name in entries})


def test_unknown_key_lists_the_choices():
    with pytest.raises(ValueError, match="'amd' is unknown; choose one of none, concat, crossattn"):
        network_inputs("amd", X, {})
