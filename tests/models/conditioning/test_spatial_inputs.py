"""What joins the network's input on the channels."""

from diffusion_jax.models.conditioning.spatial_inputs import image_latents, inpainting_mask


def test_images_and_masks_say_what_becomes_of_their_pixels():
    assert image_latents(input_key="a").staged == "latents"
    edit = image_latents(input_key="a", scaled=False, ucg_rate=0.1, ucg_group="g", ucg_from=0.05)
    assert (edit.staged, edit.ucg_rate, edit.ucg_group, edit.ucg_from) == ("mode", 0.1, "g", 0.05)
    assert inpainting_mask().input_key == "mask" and inpainting_mask().staged == "hole"
