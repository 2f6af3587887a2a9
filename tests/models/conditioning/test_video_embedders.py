"""Encoded frames: the latents of an encoder, their order, and the numbers beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.models.conditioning.conditioner import embed
from diffusion_jax.models.conditioning.embedders import encoded_frames, numbers
from diffusion_jax.models.conditioning.video_embedders import EncodedFrames
from diffusion_jax.models.first_stage.autoencoder import Autoencoder

FIELDS = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4, "z_channels": 3}
AUTOENCODER = Autoencoder(**FIELDS, embed_dim=3, attn_type="none")
FRAMES = jax.random.uniform(jax.random.key(0), (2, 3, 8, 8, 3), minval=-1.0)


def params_of(module, *inputs):
    return drawn(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def test_latents_are_the_means_and_the_parameters_those_of_the_encoder():
    module = EncodedFrames(AUTOENCODER, copies=2, level_dim=6)
    params = params_of(module, FRAMES)
    assert set(params) == {"encoder", "quant_conv"}

    @jax.jit
    def run(params, frames):
        moments = AUTOENCODER.apply({"params": params}, frames[:, 1], method="encode")
        return module.apply({"params": params}, frames), moments

    (latents, level), moments = run(params, FRAMES)
    assert latents.shape == (2, 6, 4, 4, 3)
    for place in (2, 3):  # both copies of the second frame
        np.testing.assert_allclose(latents[:, place], moments[..., :3], rtol=1e-5, atol=1e-5)
    angles = 1e-5 * 10000.0 ** (-np.arange(3) / 3)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(level, np.broadcast_to(expected, (2, 6)), atol=1e-7)


def embedders(**options):
    return {
        "frame": encoded_frames(**FIELDS, attn_type="none", ucg_rate=0.5, **options),
        "fps": numbers(input_key="fps_id", size=1, outdim=4),
        "polars": numbers(input_key="polars_rad", size=1, outdim=2, frames=3),
    }


@pytest.mark.slow
def test_guidance_drops_the_frame_and_keeps_the_vector_which_each_frame_gets():
    found = embedders()
    example = found["frame"].example(2, (4, 4, 3))
    assert example.shape == (2, 8, 8, 3) and found["polars"].example(2, (4, 4, 3)).shape == (
        2,
        3,
        1,
    )
    params = {"frame": params_of(found["frame"].module, example)}
    batch = {
        "cond_frames": FRAMES[:, 0],
        "fps_id": jnp.asarray([[6.0], [24.0]]),
        "polars_rad": jnp.arange(6.0).reshape(2, 3, 1),
    }
    with_frame, without = (
        embed(found, params, batch, unconditional=unconditional) for unconditional in (False, True)
    )
    assert with_frame["concat"].shape == (2, 4, 4, 3) and not without["concat"].any()
    assert float(jnp.abs(with_frame["concat"]).min()) > 0
    vector = with_frame["vector"]
    np.testing.assert_array_equal(vector, without["vector"])
    assert vector.shape == (2, 3, 6)
    np.testing.assert_allclose(vector[1, :, 0], np.cos(24.0) * np.ones(3), atol=1e-5)
    np.testing.assert_allclose(vector[..., 4], np.cos(np.arange(6.0).reshape(2, 3)), atol=1e-5)


def test_latents_may_enter_elsewhere():
    found = {"view": encoded_frames(**FIELDS, attn_type="none", frames=3, entry="cond_view")}
    params = {"view": params_of(found["view"].module, found["view"].example(2, (4, 4, 3)))}
    conditioning = embed(found, params, {"cond_frames": FRAMES})
    assert {name: array.shape for name, array in conditioning.items()} == {
        "cond_view": (2, 3, 4, 4, 3)
    }
