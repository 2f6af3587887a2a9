"""What joins the network's input on the channels."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.models.conditioning.conditioner import embed
from diffusion_jax.models.conditioning.spatial_inputs import (
    concat_image,
    image_latents,
    inpainting_mask,
)


def test_images_and_masks_say_what_becomes_of_their_pixels():
    assert image_latents(input_key="a").staged == "latents"
    edit = image_latents(input_key="a", scaled=False, ucg_rate=0.1, ucg_group="g", ucg_from=0.05)
    assert (edit.staged, edit.ucg_rate, edit.ucg_group, edit.ucg_from) == ("mode", 0.1, "g", 0.05)
    assert inpainting_mask().input_key == "mask" and inpainting_mask().staged == "hole"


def test_samples_lose_one_of_two_conditions_or_both_as_often():
    """As an edit model loses text and image: 5 % each alone, and 5 % both."""
    embedders = {
        "first": concat_image(input_key="x", channels=1, ucg_rate=0.1, ucg_group="g"),
        "second": image_latents(input_key="x", ucg_rate=0.1, ucg_group="g", ucg_from=0.05),
    }
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    found = embed(embedders, {}, {"x": jnp.ones((count, 1, 1, 1))}, keys)["concat"]
    first, second = np.asarray(found).reshape(count, 2).T == 0.0
    shares = [np.mean(first & ~second), np.mean(first & second), np.mean(~first & second)]
    np.testing.assert_allclose(shares, 0.05, atol=4 * np.sqrt(0.05 / count))
