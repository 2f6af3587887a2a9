"""What diffusers' configs of networks of videos say, and what they cannot be told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.released_unets import SVD
from support.trees import drawn

from diffusion_jax.convert.weights.diffusers_video import (
    fold_quant_conv,
    join_vae,
    video_unet_config,
    video_vae_config,
    vision_config,
)
from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.models.conditioning.clip import vision_tower
from diffusion_jax.models.first_stage import VideoAutoencoder
from diffusion_jax.models.unet.video_unet import VideoUNet


def test_svd_is_described_as_it_is_released():
    """stabilityai/stable-video-diffusion-img2vid, unet/config.json."""
    config = video_unet_config(VideoUNet(**SVD), 8, sample_size=96, num_frames=14)
    assert config.pop("_diffusers_version")
    down = "CrossAttnDownBlockSpatioTemporal"
    assert config | {"down_block_types": [down] * 3 + ["DownBlockSpatioTemporal"]} == config
    up = "CrossAttnUpBlockSpatioTemporal"
    assert config | {"up_block_types": ["UpBlockSpatioTemporal"] + [up] * 3} == config
    assert {k: v for k, v in config.items() if "block_types" not in k} == {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "addition_time_embed_dim": 256,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "in_channels": 8,
        "layers_per_block": 2,
        "num_attention_heads": [5, 10, 20, 20],
        "num_frames": 14,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 768,
        "sample_size": 96,
        "transformer_layers_per_block": 1,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_strategy": "learned"}, "merge_strategy = 'learned' has no counterpart"),
        ({"video_kernel_size": 3}, "video_kernel_size = 3 has no counterpart"),
        ({"use_spatial_context": False}, "use_spatial_context = False has no counterpart"),
        ({"transformer_depth_middle": 2}, "transformer_depth_middle = 2 has no counterpart"),
        ({"adm_in_channels": 700}, "adm_in_channels = 700 has no counterpart"),
    ],
)
def test_what_diffusers_has_no_place_for_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        video_unet_config(VideoUNet(**SVD | fields), 8, sample_size=96, num_frames=14)


def test_the_first_stage_and_the_image_encoder_are_described_as_they_are_released():
    """stabilityai/stable-video-diffusion-img2vid, vae/config.json and image_encoder/config.json."""
    config = video_vae_config(VideoAutoencoder(**KERNEL), scale_factor=0.18215)
    assert config.pop("_diffusers_version")
    assert config == {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "out_channels": 3,
        "sample_size": 256,
        "scaling_factor": 0.18215,
    }
    config = vision_config(vision_tower("ViT-H-14"))
    assert (
        config
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "projection_dim": 1024,
            "hidden_act": "gelu",
            "patch_size": 14,
            "image_size": 224,
        }
        == config
    )


KERNEL = {"video_kernel_size": (3, 1, 1)}
TINY = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4, **KERNEL}


def first_stage(**fields):
    module = VideoAutoencoder(**TINY, **fields)
    video = jnp.ones((1, 2, 4, 4, 3))
    return module, drawn(jax.eval_shape(module.init, jax.random.key(0), video)["params"])


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("fields", [{}, {"time_mode": "all"}, {"time_mode": "attn-only"}])
def test_a_decoder_of_videos_is_read_back_bit_for_bit(fields, tmp_path):
    _, params = first_stage(**fields)
    maps = ["vae_ldm"] if fields else ["vae_ldm", "vae_diffusers"]
    for name_map in maps:
        path = tmp_path / f"{name_map}.safetensors"
        save_weights(path, [export_params(params, name_map)])
        found = import_network(shapes_of(params), path, "vae")
        jax.tree.map(np.testing.assert_array_equal, found, params)
    if fields:
        with pytest.raises(ValueError, match="attention over time .* has no place in diffusers"):
            file_tensors(params, "vae_diffusers")


def test_names_of_diffusers_are_complete():
    """Those of AutoencoderKLTemporalDecoder, one of each kind; parity tests load all of them."""
    _, params = first_stage(use_quant_conv=True)
    names = {tensor.name for tensor in file_tensors(params, "vae_diffusers")}
    assert names > {
        "quant_conv.weight",
        "encoder.mid_block.resnets.0.norm1.weight",
        "decoder.mid_block.resnets.1.spatial_res_block.conv2.bias",
        "decoder.mid_block.resnets.0.temporal_res_block.norm1.weight",
        "decoder.mid_block.resnets.0.time_mixer.mix_factor",
        "decoder.mid_block.attentions.0.to_q.weight",
        "decoder.up_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight",
        "decoder.up_blocks.0.resnets.1.temporal_res_block.conv2.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.time_conv_out.weight",
    }


def test_the_convolution_after_the_encoder_is_folded_into_its_last_one():
    module, params = first_stage(use_quant_conv=True)
    folded = fold_quant_conv(params)
    plain = VideoAutoencoder(**TINY)
    image = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))

    @jax.jit
    def run(params, folded, image):
        encode = lambda module, params: module.apply({"params": params}, image, method="encode")
        return encode(module, params), encode(plain, folded)

    before, after = run(params, folded, image)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    # One that changes nothing is added for diffusers, and folds away without a trace.
    joined = join_vae(folded, None)
    jax.tree.map(np.testing.assert_array_equal, fold_quant_conv(joined), folded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_mode": "all"}, "time_mode = 'all' has no counterpart"),
        ({"video_kernel_size": 3}, "video_kernel_size = 3 has no counterpart"),
        ({"num_groups": 4}, "num_groups = 4 has no counterpart"),
        ({"num_res_blocks": 1}, "num_res_blocks = 1 has no counterpart"),
    ],
)
def test_what_diffusers_first_stage_has_no_place_for_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        video_vae_config(VideoAutoencoder(**KERNEL | fields), scale_factor=1.0)
