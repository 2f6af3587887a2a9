"""Frames follow each other clip by clip, with what is known of their clip."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.train.first_stage.frames import frames_of, on_frames


def test_frames_keep_their_order_and_what_is_known_of_their_clip():
    clips = jnp.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2, 1).astype(jnp.float32)
    batch = {
        "image": clips,
        "weight": jnp.asarray([1.0, 0.0]),
        "image_only_indicator": jnp.asarray([[0.0] * 3, [1.0] * 3]),
    }
    frames = frames_of(batch)
    assert sorted(frames) == ["image", "stills", "weight"]
    np.testing.assert_array_equal(frames["image"], np.concatenate(list(clips)))
    np.testing.assert_array_equal(frames["weight"], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(frames["stills"], [0, 0, 0, 1, 1, 1])
    assert sorted(frames_of({"image": clips})) == ["image"]


def test_a_step_sees_frames_in_the_place_of_its_batch():
    clips = {"image": jnp.zeros((2, 3, 4, 4, 1))}
    seen = on_frames(lambda state, batch, frozen: (state, batch["image"].shape, frozen), 1)
    assert seen("state", clips, "frozen") == ("state", (6, 4, 4, 1), "frozen")
