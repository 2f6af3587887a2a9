"""Folders for diffusers: what its configs say, and what it cannot be told."""

import json

import numpy as np
import pytest

from diffusion_jax.convert.weights import diffusers_folder
from diffusion_jax.convert.weights.diffusers_folder import (
    penultimate_text,
    save_diffusers,
    text_config,
    unet_config,
    unused_of_penultimate,
    vae_config,
)
from diffusion_jax.convert.weights.diffusers_schedulers import scheduler_config
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.unet.unet import UNet

UNET_SHAPED = {f"{side}put_blocks_0_0": {"x": {"bias": np.ones(1)}} for side in ("in", "out")}
SDXL = {
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (4, 2),
    "transformer_depth": (1, 2, 10),
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "num_head_channels": 64,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


def test_sdxl_is_described_as_it_is_released():
    """stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""
    config = unet_config(UNet(**SDXL), 4, sample_size=128)
    expected = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "sample_size": 128,
        "in_channels": 4,
    }
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_classes": 1000}, {"num_class_embeds": 1000}),
        ({"num_classes": "timestep"}, {"class_embed_type": "timestep"}),
        ({"num_classes": "continuous"}, {"class_embed_type": "simple_projection"}),
        ({"num_classes": None}, {}),
        ({"num_res_blocks": (1, 2, 2)}, {"layers_per_block": [1, 2, 2]}),
        ({"context_dim": (64, 64)}, {"cross_attention_dim": 64}),
        ({"num_head_channels": -1, "num_heads": 8}, {"attention_head_dim": 8}),
        ({"disable_self_attentions": (True,) * 3}, {"only_cross_attention": [True] * 3}),
    ],
)
def test_fields_of_unets(fields, expected):
    config = unet_config(UNet(**SDXL | fields), 4, sample_size=8)
    assert {name: config[name] for name in expected} == expected
    if "num_classes" in fields:
        assert "addition_embed_type" not in config


def test_a_vector_that_is_not_sdxls_is_a_class_embedding():
    config = unet_config(UNet(**SDXL), 4, sample_size=8, text_time=False)
    assert config["class_embed_type"] == "projection" and "addition_embed_type" not in config


@pytest.mark.parametrize(
    "fields",
    [
        {"use_spatial_transformer": False},
        {"context_dim": None},
        {"context_dim": (64, 32)},
        {"resblock_updown": True},
        {"conv_resample": False},
        {"patch_size": 2},
        {"n_embed": 5},
        {"num_attention_blocks": (1, 1, 1)},
        {"num_heads_upsample": 3},
        {"num_head_channels": 48},
        {"disable_middle_transformer": True},
    ],
)
def test_unets_that_diffusers_cannot_be_told_of(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name} = .* has no counterpart"):
        unet_config(UNet(**SDXL | fields), 4, sample_size=8)


def test_fields_of_autoencoders():
    config = vae_config(Autoencoder(attn_resolutions=(32,)), scale_factor=0.18215)
    assert config["block_out_channels"] == [128, 256, 512, 512]
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3
    assert (config["latent_channels"], config["layers_per_block"]) == (4, 2)
    assert config["scaling_factor"] == 0.18215 and config["use_quant_conv"]
    for fields in ({"double_z": False}, {"embed_dim": 3}, {"tanh_out": True}):
        (name,) = fields
        with pytest.raises(ValueError, match=f"^{name} = .* has no counterpart"):
            vae_config(Autoencoder(**fields), scale_factor=1.0)
    vq = vae_config(Autoencoder(double_z=False, embed_dim=3), scale_factor=1.0, num_codes=7)
    assert (vq["_class_name"], vq["num_vq_embeddings"], vq["vq_embed_dim"]) == ("VQModel", 7, 3)
    with pytest.raises(ValueError, match="^double_z = True has no counterpart in diffusers' VQ"):
        vae_config(Autoencoder(), scale_factor=1.0, num_codes=7)


def test_text_towers_are_read_off_their_parameters(text):
    config = text_config(text, num_heads=2, hidden_act="gelu")
    expected = {
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 5,
        "projection_dim": 8,
    }
    assert {name: config[name] for name in expected} == expected
    bare = {name: child for name, child in text.items() if name != "text_projection"}
    assert text_config(bare, num_heads=2, hidden_act="gelu")["architectures"] == ["CLIPTextModel"]


def test_a_folder_survives(unet, vae, text, draw, same, tmp_path):
    shapes = {
        "network": unet(),
        "first_stage": vae(),
        "conditioner": {"text": text, "text_2": text},
    }
    params = draw(shapes)
    configs = {name: {"_class_name": f"A{name}"} for name in ("network", "first_stage")}
    configs |= {"text": {"architectures": ["T"]}, "text_2": {"architectures": ["T"]}}
    configs["scheduler"] = scheduler_config(beta_start=0.1, beta_end=0.2)
    folder = tmp_path / "out"
    save_diffusers(folder, params, configs)
    assert same(import_network(shapes["network"], folder, "unet"), params["network"])
    assert same(import_network(shapes["first_stage"], folder, "vae"), params["first_stage"])
    for number, name in enumerate(shapes["conditioner"]):
        read = import_network(text, folder, "clip text", number=number)
        assert same(read, params["conditioner"][name])
    assert same(import_network(text, folder, "clip text"), params["conditioner"]["text"])
    with pytest.raises(ValueError, match="has 2 parts named text_encoder, and number 3 is needed"):
        import_network(text, folder, "clip text", number=2)
    assert json.loads((folder / "model_index.json").read_text()) == {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "_diffusers_version": diffusers_folder.VERSION,
        "unet": ["diffusers", "Anetwork"],
        "vae": ["diffusers", "Afirst_stage"],
        "text_encoder": ["transformers", "T"],
        "text_encoder_2": ["transformers", "T"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    assert json.loads((folder / "vae/config.json").read_text()) == {"_class_name": "Afirst_stage"}
    with pytest.raises(FileExistsError, match="out exists"):
        save_diffusers(folder, params, configs)


@pytest.mark.parametrize(
    ("texts", "pipeline", "absent"),
    [
        (["text"], "StableDiffusionPipeline", {"safety_checker", "feature_extractor"}),
        (["text_2"], "StableDiffusionXLImg2ImgPipeline", {"text_encoder", "tokenizer"}),
    ],
)
def test_pipelines_are_told_by_their_text_encoders(texts, pipeline, absent, text, draw, tmp_path):
    params = {"network": UNET_SHAPED, "conditioner": {name: draw(text) for name in texts}}
    configs = {name: {"architectures": ["T"]} for name in ("network", *texts)}
    save_diffusers(tmp_path / "x", params, configs)
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    assert index["_class_name"] == pipeline
    assert {name for name, value in index.items() if value == [None, None]} == absent


def test_the_text_encoder_of_stable_diffusion_2_loses_what_it_never_used(
    text, draw, same, tmp_path
):
    params = draw(text)
    config = text_config(penultimate_text(params), num_heads=2, hidden_act="gelu")
    assert (config["num_hidden_layers"], config["architectures"]) == (1, ["CLIPTextModel"])
    trees = {"conditioner": {"text": penultimate_text(params)}}
    save_diffusers(tmp_path / "x", trees, {"text": config})
    read = import_network(text, tmp_path / "x", "clip text", zeros=unused_of_penultimate(2))
    assert same(penultimate_text(read), penultimate_text(params))
    assert not read["text_projection"]["kernel"].any()
    with pytest.raises(ValueError, match="17 missing: text_model.encoder.layers.1"):
        import_network(text, tmp_path / "x", "clip text")


def test_folders_are_whole_or_not_there(unet, draw, tmp_path):
    params = {"network": draw(unet())}
    with pytest.raises(ValueError, match="component 'network' has no config; there are"):
        save_diffusers(tmp_path / "out", params, {})
    with pytest.raises(TypeError):
        save_diffusers(tmp_path / "out", params, {"network": {"x": {1, 2}}})
    assert not list(tmp_path.iterdir())
