"""Inputs in pixels, at the size of what is denoised."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.staged import in_cells, with_channels


@pytest.mark.slow
def test_an_inpainting_network_reads_the_mask_and_the_latents_that_it_leaves():
    path = "configs/sd15.py:inpaint_tiny"
    experiment, frozen = built(path), trained(path).frozen
    network = experiment.network
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    mask = np.zeros((2, 32, 32, 1), np.float32)
    mask[:, ::2, ::2] = 1.0  # the top left of each 2 x 2
    batch = {"mask": jnp.asarray(mask), "masked_image": jnp.asarray(image)}
    found = in_cells(network.embedders, network.first_stage, frozen, batch)
    assert found["mask"].shape == (2, 16, 16, 1) and np.all(np.asarray(found["mask"]) == 0.0)
    want = experiment.drawing.coders.encode(frozen, image)
    np.testing.assert_allclose(found["masked_image"], want, atol=1e-5)
    # As Stable Diffusion has them: latents, mask, masked image.
    tokens = {key: jnp.zeros((2, 77), jnp.int32) for key in network.tokenize}
    weights = trained(path).params
    joined = network.embed(weights, frozen, batch | tokens)["concat"]
    np.testing.assert_allclose(joined, np.concatenate([found["mask"], want], -1), atol=1e-5)
    alone = network.embed(weights, frozen, batch | tokens, unconditional=True)["concat"]
    np.testing.assert_allclose(alone, joined, atol=1e-5)
    assert weights["network"]["input_blocks_0_0"]["kernel"].shape[2] == 9


@pytest.mark.slow
def test_an_edit_network_reads_unscaled_latents_and_may_lose_them():
    path = "configs/sd15.py:edit_tiny"
    experiment, weights = built(path), trained(path)
    network = experiment.network
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    tokens = {key: jnp.zeros((1, 77), jnp.int32) for key in network.tokenize}
    both = {"original_image": jnp.asarray(image)} | tokens
    joined = network.embed(weights.params, weights.frozen, both)["concat"]
    want = np.asarray(experiment.drawing.coders.encode(weights.frozen, image)) / 0.18215
    np.testing.assert_allclose(joined, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    lost = network.embed(weights.params, weights.frozen, both, unconditional=True)["concat"]
    assert not np.any(lost)


def test_clips_of_video_have_no_such_inputs():
    embedders = built("configs/sd15.py:edit_tiny").network.embedders
    with pytest.raises(
        ConfigError, match=r"embedders\.original is for images, and .*num_frames = 4"
    ):
        with_channels(embedders, (16, 16, 4), 4)


def test_training_begins_as_the_base_model(tmp_path):
    """The new channels of the first layer are zeros, and all else is the released file."""
    base, weights = built("configs/sd15.py:tiny"), trained("configs/sd15.py:tiny")
    base.task.export_file(weights, tmp_path / "base.safetensors")
    wide = built("configs/sd15.py:inpaint_tiny")
    params = trained("configs/sd15.py:inpaint_tiny").params
    source = (tmp_path / "base.safetensors", wide.training)
    found, _, _ = wide.task.load_released(params, {}, *source)
    kernel = found["network"]["input_blocks_0_0"]["kernel"]
    want = weights.params["network"]["input_blocks_0_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], want)
    assert kernel.shape[2] == 9 and not np.any(kernel[:, :, 4:])
    got, want = found["network"]["out_2"], weights.params["network"]["out_2"]
    np.testing.assert_array_equal(got["kernel"], want["kernel"])
