"""Configs of latent-diffusion: first stages, training, the rule of `legacy`."""

import jax
import pytest


def test_a_quantised_first_stage_converts_whole(tmp_path, yamls):
    params = "model.params.first_stage_config"
    assert not [name for name in yamls.listed(yamls.cin256()) if name.startswith(params)]
    config = yamls.load(yamls.cin256(), tmp_path)
    stage = config.first_stage.to_dict()
    assert (stage["name"], stage["num_codes"], stage["embed_dim"]) == ("autoencoder_vq", 8192, 3)
    found = yamls.build(config).network.first_stage
    shapes = jax.eval_shape(found.init, jax.random.key(0))
    assert shapes["quantize"]["embedding"].shape == (8192, 3)
    tree = yamls.cin256()
    tree["model"]["params"]["first_stage_config"]["target"] = (
        "sgm.models.autoencoder.AutoencoderLegacyVQ"
    )
    assert "before quantisation" in yamls.listed(tree)[f"{params}.target"]


def test_training_of_the_churches_is_ours(yamls):
    sections = yamls.parts(yamls.churches())[0][0]
    assert sections["train"] == {
        "num_steps": 100_000,
        "batch_size": 2 * 48,  # two GPUs
        "scale_lr": True,
        "ckpt_path": "last.ckpt",
        "ignore_keys": (r"model\.diffusion_model\.out\.",),
        "load_only_unet": True,
    }
    assert sections["optimizer"] == {
        "name": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "gradient_clip_norm": 1.0,
        "ema_decay": 0.9999,
    }
    assert sections["data"]["batches"] == {"image_size": 256, "channels": 3, "random_flip": True}
    assert sections["checkpoint"]["monitor"] == "val/loss_simple_ema"
    assert sections["model"]["dtype"] == "bfloat16" and sections["loss"]["loss_type"] == "l1"
    assert sections["guidance"] == {"name": "none"} and "embedders" not in sections["conditioning"]
    assert sections["first_stage"]["scale_by_std"] and "scale_factor" not in sections["first_stage"]


def test_legacy_counts_only_with_head_channels(yamls):
    def model(**more):
        return yamls.parts(
            yamls.changed(yamls.cin256(), "model.params.unet_config.params", base | more)
        )[0][0]

    base = yamls.cin256()["model"]["params"]["unet_config"]["params"]
    assert "legacy" not in model()["model"]
    assert model(num_head_channels=32)["model"]["legacy"] is True  # latent-diffusion's default
    assert model(num_head_channels=32, legacy=False)["model"]["legacy"] is False


def small(unet, stage_mult, condition, yamls, **more):
    """A small latent-diffusion with 4 channels of latents."""
    unet = {
        "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
        "attention_resolutions": [2], "num_heads": 4, **unet,
    }  # fmt: skip
    stage = yamls.autoencoder("ldm.models.autoencoder.AutoencoderKL", 4, stage_mult)
    return yamls.ldm(unet, stage, condition, first_stage_key="image", **more)


def test_a_map_that_is_rescaled_is_as_large_as_the_image(tmp_path, yamls):
    """The map has 4 times the sides of the latents, which two halvings make theirs."""
    rescaler = yamls.node("x.SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)
    tree = small(
        {"in_channels": 7}, [1, 2, 4], rescaler, yamls, cond_stage_key="segmentation", image_size=16
    )
    built = yamls.build(yamls.load(tree, tmp_path))
    shapes = built.network.example_inputs(2)
    assert shapes["segmentation"].shape == (2, 64, 64, 182)
    params = jax.eval_shape(built.network.init, jax.random.key(0))
    assert params["network"]["input_blocks_0_0"]["kernel"].shape == (3, 3, 4 + 3, 32)
    assert "model.params.cond_stage_config.target" not in yamls.listed(tree)


def test_resolutions_that_no_level_has_get_no_attention(tmp_path, yamls):
    """As in the originals, where such a number is never reached; the middle still attends."""
    rescaler = yamls.node("x.SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)
    tree = small(
        {"in_channels": 7, "attention_resolutions": [8]}, [1, 2, 4], rescaler, yamls,
        cond_stage_key="segmentation", image_size=16,
    )  # fmt: skip
    built = yamls.build(yamls.load(tree, tmp_path))
    names = jax.eval_shape(built.network.init, jax.random.key(0))["network"]
    attending = {name for name, block in names.items() if "qkv" in block}
    assert attending == {"middle_block_1"}
    noted = yamls.listed(tree)["model.params.unet_config.params.attention_resolutions"]
    assert "[8] names no level" in noted


def test_the_upscaler_knows_the_noise_of_its_small_image_as_a_class(tmp_path, yamls):
    text = yamls.node("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", layer="penultimate")
    tree = small(
        {"in_channels": 7, "num_classes": 1000, "use_spatial_transformer": True,
         "context_dim": 1024, "legacy": False},
        [1, 2, 4], text, yamls, cond_stage_key="txt", conditioning_key="hybrid-adm", image_size=16,
        low_scale_key="lr", low_scale_config=yamls.node("x.ImageConcatWithNoiseAugmentation"),
    )  # fmt: skip
    tree["model"]["target"] = "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"
    built = yamls.build(yamls.load(tree, tmp_path))
    shapes = built.network.example_inputs(2)
    assert shapes["lr"].shape == (2, 16, 16, 3) and shapes["noise_level"].shape == (2,)
    params = jax.eval_shape(built.network.init, jax.random.key(0))["network"]
    assert params["label_emb"]["embedding"].shape == (1000, 128)
    assert "under noise, and its level" in yamls.listed(tree)["model.target"]


def test_an_inpainting_model_reads_its_mask_and_the_rest_of_the_image(tmp_path, yamls):
    text = yamls.node("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", layer="penultimate")
    tree = small(
        {"in_channels": 9, "use_spatial_transformer": True, "context_dim": 1024, "legacy": False},
        [1, 2], text, yamls, cond_stage_key="txt", conditioning_key="hybrid", image_size=16,
        concat_keys=["mask", "masked_image"], masked_image_key="masked_image",
    )  # fmt: skip
    tree["model"]["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    built = yamls.build(yamls.load(tree, tmp_path))
    shapes = built.network.example_inputs(2)
    assert shapes["mask"].shape == (2, 32, 32, 1)
    assert shapes["masked_image"].shape == (2, 32, 32, 3)
    params = jax.eval_shape(built.network.init, jax.random.key(0))["network"]
    assert params["input_blocks_0_0"]["kernel"].shape == (3, 3, 9, 32)
    staged = [e.staged for e in built.network.embedders.values() if e.staged is not None]
    assert staged == ["hole", "latents"]  # the order of the released channels
    assert "everything" in built.data.batch_options["masks"]


def test_embeddings_of_images_come_with_the_batch(tmp_path, yamls):
    text = yamls.node("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", layer="penultimate")
    tree = small(
        {"in_channels": 4, "num_classes": "sequential", "adm_in_channels": 2048,
         "use_spatial_transformer": True, "context_dim": 1024},
        [1, 2], text, yamls, cond_stage_key="txt", conditioning_key="crossattn-adm",
    )  # fmt: skip
    tree["model"]["target"] = "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion"
    built = yamls.build(yamls.load(tree, tmp_path))
    assert built.network.example_inputs(2)["image_embedding"].shape == (2, 2048)


def test_zero_terminal_snr_is_kept(yamls):
    tree = yamls.changed(yamls.cin256(), "model.params.rescale_betas_zero_snr", True)
    assert yamls.parts(tree)[0][0]["schedule"]["rescale_zero_snr"] is True


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("unet_config.params.transformer_depth", "transformer_depth = .* should be"),
        ("cond_stage_key", "cond_stage_key = .* should be str"),
        ("first_stage_config.params.embed_dim", "channels of latents should be a whole number"),
    ],
)
@pytest.mark.parametrize("value", [{"a": 1}, 1.5])
def test_a_value_of_another_kind_is_told(path, message, value, yamls):
    with pytest.raises(ValueError, match=message):
        yamls.parts(yamls.changed(yamls.cin256(), f"model.params.{path}", value))
