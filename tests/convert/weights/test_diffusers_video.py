"""What diffusers' configs of networks of videos say, and what they cannot be told."""

import pytest
from support.released_unets import SVD

from diffusion_jax.convert.weights.diffusers_video import video_unet_config
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
