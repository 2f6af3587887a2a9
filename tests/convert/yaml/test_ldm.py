"""Configs of latent-diffusion: first stages, training, the rule of `legacy`."""

import jax


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
