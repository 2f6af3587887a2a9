"""Every conditioning key reaches a real UNet: what it sees, changes what it predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.conditioned import ROWS, UNET
from support.trees import drawn

from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.models.conditioning.routing import CONDITIONING_KEYS


def make(key):
    needed = CONDITIONING_KEYS[key]
    model = dict(UNET)
    if "crossattn" in needed:
        model |= dict(use_spatial_transformer=True, context_dim=6)
    if "vector" in needed:
        model |= dict(num_classes="sequential", adm_in_channels=5)
    embedders = {ROWS[entry][0]: ROWS[entry][1] for entry in needed}
    return build_network(model, dict(key=key, embedders=embedders), (8, 8, 1))


@pytest.mark.parametrize("key", CONDITIONING_KEYS)
def test_every_entry_changes_the_prediction(key):
    network = make(key)
    # Zero-initialised outputs would hide the conditioning.
    params = drawn(jax.eval_shape(network.init, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    t = jnp.array([3, 7])
    batch = network.example_inputs(2)

    @jax.jit
    def predict(batch):
        return network.apply(params, x, t, network.embed(params, {"conditioner": {}}, batch))

    before = predict(batch)
    assert before.shape == (2, 8, 8, 1) and before.dtype == jnp.float32
    for name, value in batch.items():
        after = predict(batch | {name: value + 1})
        assert np.abs(np.asarray(after - before)).max() > 1e-4, name


def test_conditioning_that_the_key_does_not_use_is_an_error():
    network = build_network(UNET, dict(embedders={"low": ROWS["concat"][1]}), (8, 8, 1))
    with pytest.raises(ValueError, match=r"'none' needs the entries \[\], got \['concat'\]"):
        network.init(jax.random.key(0))
