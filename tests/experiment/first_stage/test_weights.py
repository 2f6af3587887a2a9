"""Where LPIPS gets its weights, and what of a first stage other programs can read."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.experiment.first_stage.weights import (
    check_lpips,
    export_first_stage,
    load_first_stage,
    load_video_first_stage,
    read_lpips,
)
from diffusion_jax.experiment.task import Training
from diffusion_jax.train.checkpoints.checksums import named_leaves

VAE, VQ = "configs/emoji_vae.py:tiny", "configs/vq_f4.py:tiny"
VIDEO = "configs/svd_decoder.py:tiny"
# An autoencoder of images with the layers of VIDEO within a frame.
IMAGE = (
    *(f"--config.model.{field}" for field in ("ch=8", "num_groups=4", "attn_type=vanilla")),
    "--config.discriminator.ndf=8",
)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module", params=[VAE, VQ])
def exported(request, tmp_path_factory):
    """A first stage as a file of latent-diffusion, with its averages beside it."""
    path = tmp_path_factory.mktemp("first_stage") / "x.safetensors"
    weights = trained(request.param)
    assert export_first_stage(weights, path) == "first stage of latent-diffusion"
    return built(request.param), weights, path


@pytest.mark.parametrize("averages", [False, True])
def test_a_file_is_read_back_whole_raw_or_averaged(exported, averages):
    experiment, weights, path = exported
    state = experiment.abstract_state()
    training = Training(num_steps=1, batch_size=1, ckpt_ema=averages)
    params, mutable, absent = load_first_stage(state.params, state.mutable, path, training)
    expected = weights.ema["autoencoder"] if averages else weights.params["autoencoder"]
    same(params["autoencoder"], expected)
    same(params["discriminator"], weights.params["discriminator"])
    same(jax.tree.leaves(mutable), jax.tree.leaves(weights.mutable))
    assert absent == []


def test_keys_can_be_left_as_they_are(exported):
    experiment, weights, path = exported
    before = jax.tree.map(np.zeros_like, weights.params)
    training = Training(num_steps=1, batch_size=1, ignore_keys=(r"decoder\.conv_out\.",))
    params, *_ = load_first_stage(before, experiment.abstract_state().mutable, path, training)
    own = params["autoencoder"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(own["decoder"]["conv_out"]))
    same(own["decoder"]["conv_in"], weights.params["autoencoder"]["decoder"]["conv_in"])


def test_lpips_comes_from_its_own_file_then_from_the_checkpoint(exported, tmp_path):
    _, weights, path = exported
    net = exported[0].task.reconstructing.lpips_net
    lpips = weights.frozen["lpips"]
    same(read_lpips(net, None, path), lpips)
    other = tmp_path / "own.safetensors"
    export_first_stage(weights._replace(frozen={"lpips": jax.tree.map(np.negative, lpips)}), other)
    same(read_lpips(net, str(other), path), jax.tree.map(np.negative, lpips))


def test_what_lpips_lacks_is_found_before_any_work(exported, tmp_path):
    _, weights, path = exported
    net = exported[0].task.reconstructing.lpips_net
    check_lpips(net, "random", None)
    check_lpips(net, None, str(path))
    with pytest.raises(FileNotFoundError, match=r"config\.perceptual\.weights = '.*none\.ckpt' do"):
        check_lpips(net, f"{tmp_path}/none.ckpt", None)
    cut = tmp_path / "cut.safetensors"
    shutil.copy(path, cut)
    cut.write_bytes(cut.read_bytes()[:50_000])
    with pytest.raises(ValueError, match="is cut off"):
        check_lpips(net, str(cut), None)


def test_a_file_of_images_starts_a_decoder_of_videos(tmp_path):
    weights = trained(VAE, *IMAGE, "--config.model.use_quant_conv=False")
    export_first_stage(weights, tmp_path / "image.safetensors")
    before, module = trained(VIDEO), built(VIDEO).task.reconstructing.module
    training = Training(num_steps=1, batch_size=1)
    params, _, absent = load_video_first_stage(
        module, before.params, before.mutable, tmp_path / "image.safetensors", training
    )
    assert absent and all("time_" in name for name in absent)
    names = named_leaves(before.params["autoencoder"])
    assert len(absent) == sum("time_" in name for name in names)
    own, read = named_leaves(weights.params["autoencoder"]), named_leaves(params["autoencoder"])
    for name, before_ in names.items():
        np.testing.assert_array_equal(read[name], before_ if "time_" in name else own[name])


def test_files_of_videos_and_of_images_with_other_convolutions_are_read(tmp_path):
    abstract = built(VIDEO).abstract_state()
    module, weights = built(VIDEO).task.reconstructing.module, trained(VIDEO)
    training = Training(num_steps=1, batch_size=1)

    def load(path):
        return load_video_first_stage(module, abstract.params, abstract.mutable, path, training)

    export_first_stage(weights, tmp_path / "video.safetensors")
    params, mutable, absent = load(tmp_path / "video.safetensors")
    same((params, mutable, absent), (weights.params, weights.mutable, []))
    image = trained(VAE, *IMAGE)
    export_first_stage(image, tmp_path / "image.safetensors")
    params, _, _ = load(tmp_path / "image.safetensors")
    first = params["autoencoder"]["decoder"]["conv_in"]["kernel"]
    own = image.params["autoencoder"]
    expected = jnp.einsum(
        "im,yxmo->yxio", own["post_quant_conv"]["kernel"][0, 0], own["decoder"]["conv_in"]["kernel"]
    )
    np.testing.assert_allclose(first, expected, atol=1e-5)
