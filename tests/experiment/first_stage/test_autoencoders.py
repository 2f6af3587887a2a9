"""What autoencoders of images and of videos do differently, and their folders of diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.first_stage.autoencoders import export_first_stage_folder, kind_of
from diffusion_jax.experiment.first_stage.weights import load_video_first_stage
from diffusion_jax.experiment.task import Training

VAE, VQ = "configs/emoji_vae.py:tiny", "configs/vq_f4.py:tiny"
VIDEO = "configs/svd_decoder.py:tiny"


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_each_kind_reads_its_data():
    images = kind_of(built(VAE).task.reconstructing.module)
    clips = kind_of(built(VIDEO).task.reconstructing.module)
    picture = jnp.zeros((2, 8, 8, 3))
    assert images.input_of(picture).shape == (2, 8, 8, 3)
    assert clips.input_of(picture).shape == (1, 2, 8, 8, 3)
    images.check_frames(None)
    clips.check_frames(4)
    with pytest.raises(ConfigError, match=r"num_frames = 4 makes clips of video"):
        images.check_frames(4)
    with pytest.raises(ConfigError, match=r"'autoencoder_video' decodes clips of video; set "):
        clips.check_frames(None)
    assert images.extra_inputs(3, None) == {}
    assert clips.extra_inputs(3, 4)["image_only_indicator"].shape == (3, 4)


def test_a_step_sees_the_frames_of_clips():
    def shape_of(batch):
        return batch["image"].shape

    batch = {"image": jnp.zeros((2, 4, 8, 8, 3))}
    images = kind_of(built(VAE).task.reconstructing.module)
    clips = kind_of(built(VIDEO).task.reconstructing.module)
    assert images.on_batches(shape_of, 0)(batch) == (2, 4, 8, 8, 3)
    assert clips.on_batches(shape_of, 0)(batch) == (8, 8, 8, 3)


def test_of_videos_only_the_decoder_is_trained_by_default():
    images = kind_of(built(VAE).task.reconstructing.module)
    clips = kind_of(built(VIDEO).task.reconstructing.module)
    assert images.trainable is None
    assert clips.trainable == "^autoencoder/decoder/|^loss/"


@pytest.mark.parametrize("path", [VAE, VQ])
def test_a_folder_of_diffusers_holds_the_autoencoder_alone(path, tmp_path):
    experiment, weights = built(path), trained(path)
    module = experiment.task.reconstructing.module
    name = (experiment.sections["regularizer"] or {"name": "kl"})["name"]
    export_first_stage_folder(module, name, weights, tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir() if path.is_dir()] == ["vae"]
    config = json.loads((tmp_path / "x/vae/config.json").read_text())
    assert config["_class_name"] == {"kl": "AutoencoderKL", "vq": "VQModel"}[name]
    written = open_weights(tmp_path / "x", "vae").tensors["decoder.conv_out.bias"].load()
    own = weights.params["autoencoder"]["decoder"]["conv_out"]["bias"]
    np.testing.assert_array_equal(written, own)


@pytest.mark.parametrize("name", ["ema_vq", "gumbel"])
def test_quantizers_that_diffusers_lacks_are_named(tmp_path, name):
    module = built(VQ).task.reconstructing.module
    with pytest.raises(ConfigError, match=rf"config\.regularizer\.name = '{name}' has no counterp"):
        export_first_stage_folder(module, name, trained(VQ), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_decoder_of_videos_becomes_a_folder_of_diffusers(tmp_path):
    options = ("ch=32", "num_groups=32", "num_res_blocks=2")
    options = tuple(f"--config.model.{option}" for option in options)
    experiment, weights = built(VIDEO, *options), trained(VIDEO, *options)
    module = experiment.task.reconstructing.module
    with pytest.raises(ConfigError, match="diffusers, which has kl; export"):
        export_first_stage_folder(module, "vq", weights, tmp_path / "vae")
    export_first_stage_folder(module, "kl", weights, tmp_path / "vae")
    said = json.loads((tmp_path / "vae" / "vae" / "config.json").read_text())
    assert said["_class_name"] == "AutoencoderKLTemporalDecoder"
    abstract = experiment.abstract_state()
    training = Training(num_steps=1, batch_size=1)
    params, _, absent = load_video_first_stage(
        module, abstract.params, abstract.mutable, tmp_path / "vae", training
    )
    same(params["autoencoder"], weights.params["autoencoder"])
    assert absent == ["loss.discriminator"]
