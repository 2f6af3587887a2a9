"""Video models of generative-models: frames, vectors of the released widths, decoders, guidance."""

import jax
import pytest

from diffusion_jax.convert.yaml import video_tables
from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.models.first_stage import Autoencoder, VideoAutoencoder
from diffusion_jax.models.unet import MultiviewUNet, VideoUNet

# What the released models have: network, width of the vector, frames, first stage, guidance.
MODELS = {
    "svd": (
        VideoUNet,
        768,
        14,
        VideoAutoencoder,
        {"name": "linear", "scale": 2.5, "min_scale": 1.0},
    ),
    "sv3d_p": (VideoUNet, 1280, 21, Autoencoder, {"name": "triangle", "scale": 2.5}),
    "sv4d": (MultiviewUNet, 1280, 40, Autoencoder, {"name": "linear", "scale": 2.5}),
}
SOURCES = {
    "svd": {"name": "video_folder", "num_frames": 14},
    "sv3d_p": {"name": "video_folder", "num_frames": 21, "cameras": True},
    "sv4d": {"name": "view_folder", "num_frames": 10},  # 5 times of 8 views, and as many again
}
# The last parts of the paths that have no counterpart.
LEFT = {"spatial_transformer_attn_type", "embed_dim", "out_ch"}
LEFT_OF = {
    "svd": {"disable_encoder_autocast"},
    "sv3d_p": set(),
    "sv4d": {"additional_cond_keys", "replicate_time_mix_bug", "target", "params"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_released_models(name, yamls):
    network, width, frames, stage, guidance = MODELS[name]
    (sections, chosen), left = yamls.parts(yamls.VIDEOS[name]())
    assert sections["guidance"] == guidance and sections["sampler"]["name"] == "euler"
    assert sections["discretization"]["sigma_max"] == 700.0
    assert sections["denoiser"] == {"name": "continuous", "scaling": {"name": "v_edm"}}
    assert sections["data"]["batches"]["num_frames"] == frames
    assert sections["data"]["source"] == {"folder": "set me"} | SOURCES[name]
    assert any("a tenth of the clips loses its conditioning" in line for line in chosen)
    assert {path.rpartition(".")[2] for path in left} == LEFT | LEFT_OF[name]
    embedders = sections["conditioning"]["embedders"]
    for section in embedders.values():
        if section["name"] == "open_clip_image":
            section |= {"num_layers": 1}  # it is traced
    built = build_network(
        sections["model"], sections["conditioning"], (64, 64, 3), sections["first_stage"]
    )
    assert isinstance(built.module, network) and isinstance(built.first_stage.module, stage)
    shapes = conditioning_shapes(built.embedders, built.image_shape)
    assert shapes["vector"].shape[-1] == width and shapes["crossattn"].shape[-1] == 1024
    assert shapes["concat"].shape[-3:] == (8, 8, 4)
    # Guidance has no other vector, but for the noise level of SV4D's frames.
    dropped = {one for one, section in embedders.items() if section.get("ucg_rate")}
    kinds = {embedders[one]["name"] for one in dropped}
    assert kinds == {"open_clip_image", "encoded_frames"}
    assert len({embedders[one]["ucg_group"] for one in dropped}) == 1
    if stage is Autoencoder:
        params = jax.eval_shape(built.first_stage.init, jax.random.key(0))
        assert set(params) == {"decoder"}
    else:
        assert built.first_stage.module.video_kernel_size == (3, 1, 1)


def test_every_class_of_video_models_has_a_row():
    assert set(video_tables.NETWORKS) == {"VideoUNet", "SpatialUNetModelWithTime"}
    assert {row.name for row in video_tables.GUIDERS.values()} == {
        "linear", "triangle", "trapezoid", "spatiotemporal",
    }  # fmt: skip


def test_a_first_stage_of_videos_is_not_trained(yamls):
    tree = yamls.svd()["model"]["params"]["first_stage_config"]
    with pytest.raises(ValueError, match="VideoDecoder' should be the decoder of images"):
        yamls.parts({"model": tree})
