"""YAML configs of the originals -> config files of ours: they build, with the released sizes, and
no key is overlooked."""

import copy
import math
import subprocess
import sys
from typing import Any

import jax
import pytest
import yaml

from diffusion_jax.convert.yaml.from_yaml import config_from_yaml, convert_sections
from diffusion_jax.convert.yaml.reading import Node, leaves, leftovers, read_yaml
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config_files import load_config

LDM, SGM = "ldm.modules", "sgm.modules"
DDPM = "ldm.models.diffusion.ddpm"


def node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params} if params else {"target": target}


def autoencoder(target: str, embed_dim: int, ch_mult: list[int], **more: Any) -> dict[str, Any]:
    ddconfig = {
        "double_z": True, "z_channels": embed_dim, "resolution": 256, "in_channels": 3,
        "out_ch": 3, "ch": 128, "ch_mult": ch_mult, "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    ddconfig |= more.pop("ddconfig", {})
    loss = node("torch.nn.Identity")
    return node(target, embed_dim=embed_dim, ddconfig=ddconfig, lossconfig=loss, **more)


def ldm(unet: dict[str, Any], first_stage: Any, cond_stage: Any, **params: Any) -> dict[str, Any]:
    unet = node(f"{LDM}.diffusionmodules.openaimodel.UNetModel", image_size=32, **unet)
    more = {"unet_config": unet, "first_stage_config": first_stage, "cond_stage_config": cond_stage}
    base = {
        "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000, "channels": 4,
        "monitor": "val/loss_simple_ema", "use_ema": False,
    }  # fmt: skip
    model = node(f"{DDPM}.LatentDiffusion", **{**base, **params, **more})
    return {"model": {"base_learning_rate": 1e-4, **model}}


def legacy_levels() -> dict[str, Any]:
    return node(f"{SGM}.diffusionmodules.discretizer.LegacyDDPMDiscretization")


def engine(unet: dict[str, Any], embedders: list[Any], **params: Any) -> dict[str, Any]:
    scaling = node(f"{SGM}.diffusionmodules.denoiser_scaling.EpsScaling")
    denoiser = node(
        f"{SGM}.diffusionmodules.denoiser.DiscreteDenoiser",
        num_idx=1000, scaling_config=scaling, discretization_config=legacy_levels(),
    )  # fmt: skip
    base = {
        "network_config": node(f"{SGM}.diffusionmodules.openaimodel.UNetModel", **unet),
        "denoiser_config": denoiser,
        "conditioner_config": node("sgm.modules.GeneralConditioner", emb_models=embedders),
    }
    return {"model": node("sgm.models.diffusion.DiffusionEngine", **{**base, **params})}


def embedder(kind: str, input_key: str, params: dict[str, Any], **more: Any) -> dict[str, Any]:
    target = f"{SGM}.encoders.modules.{kind}"
    return {"is_trainable": False, "input_key": input_key, **more, **node(target, **params)}


def sizes(*keys: str, **more: Any) -> list[dict[str, Any]]:
    return [embedder("ConcatTimestepEmbedderND", key, {"outdim": 256}, **more) for key in keys]


BIG_G = embedder(
    "FrozenOpenCLIPEmbedder2",
    "txt",
    {
        "arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True,
        "layer": "penultimate", "always_return_pooled": True, "legacy": False,
    },
)  # fmt: skip
SIZES = ("original_size_as_tuple", "crop_coords_top_left")
KL_F8 = ("sgm.models.autoencoder.AutoencoderKL", 4, [1, 2, 4, 4])
SDXL_STAGE = autoencoder(*KL_F8, monitor="val/rec_loss", ddconfig={"attn_type": "vanilla-xformers"})
SGM_UNET = {
    "use_checkpoint": True, "in_channels": 4, "out_channels": 4, "num_res_blocks": 2,
    "num_head_channels": 64, "use_linear_in_transformer": True,
}  # fmt: skip
STAGE_OF_SD = {"scale_factor": 0.18215, "linear_start": 0.00085, "linear_end": 0.012}
LDM_STAGE = autoencoder("ldm.models.autoencoder.AutoencoderKL", 4, [1, 2, 4, 4])
WARM_UP = {
    "warm_up_steps": [10000], "cycle_lengths": [10000000000000], "f_start": [1e-6], "f_max": [1.0],
    "f_min": [1.0],
}  # fmt: skip
LIGHTNING = {
    "modelcheckpoint": {"params": {"every_n_train_steps": 5000}},
    "callbacks": {
        "metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_steps": 25000}},
        "image_logger": node(
            "main.ImageLogger",
            disabled=False, batch_frequency=1000, max_images=16, increase_log_steps=True,
            log_first_step=False, enable_autocast=False,
            log_images_kwargs={"use_ema_scope": False, "N": 16, "n_rows": 4},
        ),
    },
    "trainer": {
        "devices": "0,", "benchmark": True, "num_sanity_val_steps": 0,
        "accumulate_grad_batches": 1, "max_epochs": 20,
    },
}  # fmt: skip


def sd_xl_base() -> dict[str, Any]:
    clip = embedder("FrozenCLIPEmbedder", "txt", {"layer": "hidden", "layer_idx": 11})
    unet = {
        "adm_in_channels": 2816, "num_classes": "sequential", "model_channels": 320,
        "attention_resolutions": [4, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [1, 2, 10], "context_dim": 2048,
        "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    return engine(
        SGM_UNET | unet, [clip, BIG_G, *sizes(*SIZES, "target_size_as_tuple")],
        scale_factor=0.13025, disable_first_stage_autocast=True, first_stage_config=SDXL_STAGE,
    )  # fmt: skip


def sd_xl_refiner() -> dict[str, Any]:
    unet = {
        "adm_in_channels": 2560, "num_classes": "sequential", "model_channels": 384,
        "attention_resolutions": [4, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": 4,
        "context_dim": [1280] * 4,
    }  # fmt: skip
    return engine(
        SGM_UNET | unet, [BIG_G, *sizes(*SIZES, "aesthetic_score")],
        scale_factor=0.13025, disable_first_stage_autocast=True, first_stage_config=SDXL_STAGE,
    )  # fmt: skip


SD2_UNET = {
    "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": 1, "context_dim": 1024,
}  # fmt: skip


def sd_2_1() -> dict[str, Any]:
    text = {"freeze": True, "layer": "penultimate"}
    return engine(
        SGM_UNET | SD2_UNET, [embedder("FrozenOpenCLIPEmbedder", "txt", text)],
        scale_factor=0.18215, first_stage_config=autoencoder(*KL_F8),
    )  # fmt: skip


def v2_inference_v() -> dict[str, Any]:
    return ldm(
        SGM_UNET | SD2_UNET | {"use_fp16": True, "use_spatial_transformer": True, "legacy": False},
        LDM_STAGE,
        node(f"{LDM}.encoders.modules.FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate"),
        parameterization="v", image_size=64, conditioning_key="crossattn", cond_stage_key="txt",
        first_stage_key="jpg", cond_stage_trainable=False, **STAGE_OF_SD,
    )  # fmt: skip


def v1_inference() -> dict[str, Any]:
    unet = {
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
        "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768,
        "use_checkpoint": True, "legacy": False,
    }  # fmt: skip
    return ldm(
        unet, LDM_STAGE, node(f"{LDM}.encoders.modules.FrozenCLIPEmbedder"),
        image_size=64, conditioning_key="crossattn", cond_stage_key="txt", first_stage_key="jpg",
        cond_stage_trainable=False, **STAGE_OF_SD,
        scheduler_config=node("ldm.lr_scheduler.LambdaLinearScheduler", **WARM_UP),
    )  # fmt: skip


def cin256() -> dict[str, Any]:
    unet = {
        "in_channels": 3, "out_channels": 3, "model_channels": 192, "num_res_blocks": 2,
        "attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1,
        "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512,
    }  # fmt: skip
    stage = autoencoder(
        "ldm.models.autoencoder.VQModelInterface", 3, [1, 2, 4],
        n_embed=8192, ddconfig={"double_z": False},
    )  # fmt: skip
    classes = {"n_classes": 1001, "embed_dim": 512, "key": "class_label"}
    return ldm(
        unet, stage, node(f"{LDM}.encoders.modules.ClassEmbedder", **classes),
        image_size=64, channels=3, conditioning_key="crossattn", cond_stage_key="class_label",
        cond_stage_trainable=True, first_stage_key="image", linear_start=0.0015,
        linear_end=0.0195,
    )  # fmt: skip


def churches() -> dict[str, Any]:
    unet = {
        "in_channels": 4, "out_channels": 4, "model_channels": 192, "num_res_blocks": 2,
        "attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4], "num_heads": 8,
        "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    whole = ldm(
        unet, LDM_STAGE, "__is_unconditional__",
        image_size=32, loss_type="l1", cond_stage_key="image", concat_mode=False,
        scale_by_std=True, use_ema=True, linear_start=0.0015, linear_end=0.0155,
        ckpt_path="last.ckpt", ignore_keys=["model.diffusion_model.out."], load_only_unet=True,
    )  # fmt: skip
    split = "ldm.data.lsun.LSUNChurches"
    data = node(
        "main.DataModuleFromConfig",
        batch_size=48, num_workers=5, wrap=False, train=node(f"{split}Train", size=256),
        validation=node(f"{split}Validation", size=256),
    )  # fmt: skip
    trainer = {"benchmark": True, "gpus": "0,1", "precision": 16, "gradient_clip_val": 1.0}
    return whole | {"data": data, "lightning": {"trainer": trainer}}


def edm(sigma_data: float) -> dict[str, Any]:
    """Denoiser, loss and sampler of the toy examples."""
    kinds = f"{SGM}.diffusionmodules"
    scaling = node(f"{kinds}.denoiser_scaling.EDMScaling", sigma_data=sigma_data)
    weighting = node(f"{kinds}.loss_weighting.EDMWeighting", sigma_data=sigma_data)
    sampling = node(f"{kinds}.sigma_sampling.EDMSampling")
    levels = node(f"{kinds}.discretizer.EDMDiscretization")
    guider = node(f"{kinds}.guiders.VanillaCFG", scale=3.0)
    return {
        "denoiser_config": node(f"{kinds}.denoiser.Denoiser", scaling_config=scaling),
        "loss_fn_config": node(
            f"{kinds}.loss.StandardDiffusionLoss",
            loss_weighting_config=weighting, sigma_sampler_config=sampling,
        ),
        "sampler_config": node(
            f"{kinds}.sampling.EulerEDMSampler",
            num_steps=50, discretization_config=levels, guider_config=guider,
        ),
        "first_stage_config": node("sgm.models.autoencoder.IdentityFirstStage"),
    }  # fmt: skip


TOY_UNET = {
    "in_channels": 1, "out_channels": 1, "model_channels": 32, "attention_resolutions": [],
    "num_res_blocks": 4, "channel_mult": [1, 2, 2], "num_head_channels": 32,
}  # fmt: skip


def mnist_cond() -> dict[str, Any]:
    label = {"embed_dim": 128, "n_classes": 10}
    labels = embedder("ClassEmbedder", "cls", label, ucg_rate=0.2) | {"is_trainable": True}
    adm = {"num_classes": "sequential", "adm_in_channels": 128}
    whole = engine(TOY_UNET | adm, [labels], **edm(1.0))
    whole["model"]["base_learning_rate"] = 1e-4
    data = node("sgm.data.mnist.MNISTLoader", batch_size=512, num_workers=1)
    return whole | {"data": data, "lightning": LIGHTNING}


def mnist() -> dict[str, Any]:
    return engine(TOY_UNET, [], **edm(1.0))


def imagenet_f8() -> dict[str, Any]:
    unet = {
        "use_checkpoint": True, "in_channels": 4, "out_channels": 4, "model_channels": 256,
        "attention_resolutions": [1, 2, 4], "num_res_blocks": 2, "channel_mult": [1, 2, 4],
        "num_head_channels": 64, "num_classes": "sequential", "adm_in_channels": 1024,
        "transformer_depth": 1, "context_dim": 1024,
    }  # fmt: skip
    label = {"add_sequence_dim": True, "embed_dim": 1024, "n_classes": 1000}
    labels = embedder("ClassEmbedder", "cls", label, ucg_rate=0.2) | {"is_trainable": True}
    kinds = f"{SGM}.diffusionmodules"
    sampling = node(
        f"{kinds}.sigma_sampling.DiscreteSampling",
        num_idx=1000, discretization_config=legacy_levels(),
    )  # fmt: skip
    guider = node(f"{kinds}.guiders.VanillaCFG", scale=5.0)
    whole = engine(
        unet, [labels, *sizes(*SIZES, ucg_rate=0.2)],
        scale_factor=0.13025, log_keys=["cls"], first_stage_config=SDXL_STAGE,
        scheduler_config=node("sgm.lr_scheduler.LambdaLinearScheduler", **WARM_UP),
        loss_fn_config=node(
            f"{kinds}.loss.StandardDiffusionLoss",
            loss_weighting_config=node(f"{kinds}.loss_weighting.EpsWeighting"),
            sigma_sampler_config=sampling,
        ),
        sampler_config=node(
            f"{kinds}.sampling.EulerEDMSampler",
            num_steps=50, discretization_config=legacy_levels(), guider_config=guider,
        ),
        optimizer_config=node("torch.optim.AdamW", betas=[0.9, 0.99], weight_decay=0.05),
    )  # fmt: skip
    whole["model"]["base_learning_rate"] = 1e-4
    resize = node("torchvision.transforms.Resize", size=256, interpolation=3)
    crop = node("sdata.mappers.AddOriginalImageSizeAsTupleAndCropToSquare", h_key="height")
    steps = [node("sdata.mappers.TorchVisionImageTransforms", key="jpg", transforms=[resize]), crop]
    train = {
        "datapipeline": {"urls": ["DATA_PATH"], "decoders": ["pil"], "postprocessors": steps},
        "loader": {"batch_size": 64, "num_workers": 6},
    }
    data = node("sgm.data.dataset.StableDataModuleFromConfig", train=train)
    return whole | {"data": data, "lightning": LIGHTNING}


def first_stage(target: str, loss: dict[str, Any], **more: Any) -> dict[str, Any]:
    model = autoencoder(f"ldm.models.autoencoder.{target}", 4, [1, 2, 4, 4], **more)
    model["params"]["lossconfig"] = loss
    return {"model": {"base_learning_rate": 4.5e-6, **model}}


def kl_f8() -> dict[str, Any]:
    options = {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5}
    loss = node("ldm.modules.losses.LPIPSWithDiscriminator", **options)
    whole = first_stage("AutoencoderKL", loss, monitor="val/rec_loss")
    data = node("main.DataModuleFromConfig", batch_size=12, wrap=True, validation=node("x.Y"))
    trainer = {"accumulate_grad_batches": 2, "limit_val_batches": 50, "val_check_interval": 1000}
    return whole | {"data": data, "lightning": {"trainer": trainer}}


def vq_f8() -> dict[str, Any]:
    options = {"disc_num_layers": 2, "disc_start": 1, "disc_weight": 0.6, "codebook_weight": 1.0}
    loss = node("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", **options)
    return first_stage("VQModel", loss, n_embed=16384, ddconfig={"double_z": False})


EXAMPLES = {
    example.__name__: example
    for example in (
        sd_xl_base, sd_xl_refiner, sd_2_1, v2_inference_v, v1_inference, cin256, churches,
        mnist_cond, mnist, imagenet_f8,
    )
}  # fmt: skip
ALL = EXAMPLES | {"kl_f8": kl_f8, "vq_f8": vq_f8}
# Parameters of the originals' networks, counted on their own classes (upstream.md, section 7.5).
SIZES_OF_RELEASES = {
    "mnist_cond": 2_600_705,
    "mnist": 2_567_681,
    "cin256": 400_920_579,
    "sd_xl_base": 2_567_463_684,
    "sd_xl_refiner": 2_259_526_660,
    "sd_2_1": 865_910_724,
    "v2_inference_v": 865_910_724,
    "v1_inference": 859_520_964,
    "churches": 294_966_916,
    "imagenet_f8": 407_307_012,
}
CHEAP = ("mnist_cond", "mnist")


def convert(tree: Any, tmp_path, name: str = "x"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return config_from_yaml(path)


def load(tree: Any, tmp_path):
    path = tmp_path / "converted.py"
    path.write_text(convert(tree, tmp_path).source)
    return load_config(str(path), [])


def build(config, batch_size: int = 2):
    config.train.batch_size = batch_size * (
        config.train.accumulate if "accumulate" in config.train else 1
    )
    return make_experiment(config, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "name",
    [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES],
)
def test_the_converted_network_has_the_parameters_of_the_original(name, tmp_path):
    built = build(load(EXAMPLES[name](), tmp_path))
    shapes = jax.eval_shape(built.network.init, jax.random.key(0))["network"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == SIZES_OF_RELEASES[name]


@pytest.mark.parametrize(
    ("name", "shipped"), [("sd_xl_base", "sdxl"), ("sd_xl_refiner", "sdxl_refiner")]
)
def test_sdxl_converts_to_the_shipped_config(name, shipped, tmp_path):
    ours = load_config(f"configs/{shipped}.py", [])
    theirs = load(EXAMPLES[name](), tmp_path)
    with ours.unlocked(), theirs.unlocked():
        del ours.model["dtype"]  # a YAML leaves it to the precision of the trainer
        for embedder in theirs.conditioning.embedders.values():
            if embedder.name == "numbers":
                assert embedder.outdim == 256  # our default
                del embedder["outdim"]
    assert list(theirs.conditioning.embedders) == list(ours.conditioning.embedders)
    for section in ("conditioning", "model", "schedule"):
        assert theirs[section].to_dict() == ours[section].to_dict()
    ours, theirs = build(ours), build(theirs)
    assert theirs.network.module == ours.network.module
    assert theirs.network.first_stage == ours.network.first_stage._replace(
        module=theirs.network.first_stage.module
    )
    for network in (ours.network, theirs.network):
        shapes = jax.eval_shape(network.first_stage.init, jax.random.key(0))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert count == 34_163_592 + 49_490_179 + (8 * 8 + 8) + (4 * 4 + 4)


def parts(tree: Any) -> tuple[Any, dict[str, str]]:
    """Convert a tree as it is read, without its text: sections, and what is not in them."""
    root = Node("", copy.deepcopy(tree), set(), {})
    sections, chosen = convert_sections(root)
    return (sections, chosen), dict(leftovers(root))


def changed(tree: Any, path: str, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    inner: Any = tree
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[last] = value
    return tree


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value}0,1"


@pytest.mark.parametrize("name", ALL)
def test_no_value_is_overlooked(name):
    """Change each value in turn: the sections, the list or an error has to show it."""
    tree = ALL[name]()
    before = parts(tree)
    for path, value in leaves("", tree):
        if any(path == known or path.startswith(f"{known}.") for known in before[1]):
            continue
        try:
            after = parts(changed(tree, path, other(value)))
        except ValueError:
            continue
        assert after != before, path


@pytest.mark.parametrize("name", ALL)
def test_a_key_that_nobody_knows_is_listed_wherever_it_stands(name):
    tree = ALL[name]()
    before = parts(tree)[1]
    for parent in {path.rpartition(".")[0] for path, _ in leaves("", tree)}:
        typo = f"{parent}.typo_of_mine"
        listed = parts(changed(tree, typo, 3))[1].keys() - before.keys()
        assert listed == {typo} or any(typo.startswith(f"{path}.") for path in before), parent


def test_the_text_is_laid_out_as_ruff_does(tmp_path):
    files = []
    for name, example in ALL.items():
        files.append(tmp_path / f"{name}_out.py")
        files[-1].write_text(convert(example(), tmp_path, "a_rather_long_name_" * 8).source)
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", "pyproject.toml"]
        done = subprocess.run([*ruff, *map(str, files)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def listed(tree: Any) -> dict[str, str]:
    return parts(tree)[1]


def test_a_quantised_first_stage_converts_whole(tmp_path):
    params = "model.params.first_stage_config"
    assert not [name for name in listed(cin256()) if name.startswith(params)]
    config = load(cin256(), tmp_path)
    stage = config.first_stage.to_dict()
    assert (stage["name"], stage["num_codes"], stage["embed_dim"]) == ("autoencoder_vq", 8192, 3)
    found = build(config).network.first_stage
    shapes = jax.eval_shape(found.init, jax.random.key(0))
    assert shapes["quantize"]["embedding"].shape == (8192, 3)
    tree = cin256()
    tree["model"]["params"]["first_stage_config"]["target"] = (
        "sgm.models.autoencoder.AutoencoderLegacyVQ"
    )
    assert "before quantisation" in listed(tree)[f"{params}.target"]


def test_training_of_the_churches_is_ours():
    sections = parts(churches())[0][0]
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


def test_devices_and_micro_batches_make_the_global_batch():
    tree = changed(mnist_cond(), "lightning.trainer.devices", "0,1,2,")
    tree = changed(tree, "lightning.trainer.accumulate_grad_batches", 2)
    train = parts(tree)[0][0]["train"]
    assert (train["batch_size"], train["accumulate"]) == (512 * 3 * 2, 2)


def test_a_learning_rate_schedule_is_the_same_function(tmp_path):
    built = build(load(imagenet_f8(), tmp_path))
    rates = [float(built.task.lr_at(step)) for step in (0, 5000, 10_000, 90_000)]
    ramp = 1e-4 * (1e-6 + (1 - 1e-6) * 0.5)
    assert rates == pytest.approx([1e-4 * 1e-6, ramp, 1e-4, 1e-4], rel=1e-5)


def test_legacy_counts_only_with_head_channels():
    def model(**more):
        return parts(changed(cin256(), "model.params.unet_config.params", base | more))[0][0]

    base = cin256()["model"]["params"]["unet_config"]["params"]
    assert "legacy" not in model()["model"]
    assert model(num_head_channels=32)["model"]["legacy"] is True  # latent-diffusion's default
    assert model(num_head_channels=32, legacy=False)["model"]["legacy"] is False


def test_clip_stays_frozen_in_spite_of_is_trainable():
    where = "model.params.conditioner_config.params.emb_models.0"
    tree = changed(sd_xl_base(), f"{where}.is_trainable", True)
    (sections, _), notes = parts(tree)
    assert "trainable" not in sections["conditioning"]["embedders"]["clip"]
    assert "frozen there all the same" in notes[f"{where}.is_trainable"]
    tree = changed(tree, f"{where}.params.freeze", False)
    assert parts(tree)[0][0]["conditioning"]["embedders"]["clip"]["trainable"] is True


AUTOENCODING = """
model:
  base_learning_rate: 4.5e-6
  target: sgm.models.autoencoder.AutoencodingEngine
  params:
    input_key: jpg
    disc_start_iter: 3
    lr_g_factor: 2.0
    loss_config:
      target: sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator
      params:
        {disc_start: 20001, disc_weight: 0.5, learn_logvar: True,
         regularization_weights: {kl_loss: 2.0}}
    regularizer_config:
      target: sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer
    encoder_config:
      target: sgm.modules.diffusionmodules.model.Encoder
      params:
        {attn_type: none, double_z: True, z_channels: 4, resolution: 256, in_channels: 3,
         out_ch: 3, ch: 128, ch_mult: [1, 2, 4], num_res_blocks: 4, attn_resolutions: []}
    decoder_config:
      target: sgm.modules.diffusionmodules.model.Decoder
      params: ${model.params.encoder_config.params}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 8, train: {target: "${model.target}.x", params: {size: 128}}}
"""


def test_the_training_of_a_first_stage_converts_whole(tmp_path):
    path = tmp_path / "vae.yaml"
    path.write_text(AUTOENCODING)
    assert read_yaml(path).values["data"]["params"]["train"]["target"].endswith("Engine.x")
    converted = config_from_yaml(path)
    config = load_config(str(_written(converted.source, tmp_path)), [])
    assert (config.model.attn_type, config.model.use_quant_conv) == ("none", False)
    assert config.data.batches.image_size == 128 and config.train.batch_size == 8
    assert config.loss.to_dict() == {
        "name": "autoencoder", "disc_start": 20001, "disc_weight": 0.5, "learn_logvar": True,
        "regularization_weights": {"kl_loss": 2.0}, "schedule": "alternate",
    }  # fmt: skip
    assert config.optimizer.to_dict() == {
        "name": "adam", "learning_rate": 9e-6, "ema_decay": None,
    }  # fmt: skip
    assert config.disc_optimizer.learning_rate == 4.5e-6
    listed = [line.partition(": ")[0] for line in converted.unmapped]
    assert listed == ["model.params.disc_start_iter", "data.target", "data.params.train.target"]
    shapes = (
        make_experiment(config, devices=jax.devices()[:1]).abstract_state().params["autoencoder"]
    )
    counts = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[part]))
        for part in ("encoder", "decoder")
    }
    assert counts == {"encoder": 33_705_864, "decoder": 44_310_787}  # upstream.md, section 8.1


def test_latent_diffusions_first_stages_convert(tmp_path):
    kl, shipped = load(kl_f8(), tmp_path), load_config("configs/vae_kl_f8.py", [])
    assert (kl.train.batch_size, kl.checkpoint.monitor) == (12 * 2, "val/loss/rec")
    assert "accumulate" not in kl.train  # the adversary's weight is that of a whole batch
    build(kl)
    with shipped.unlocked():
        del shipped.loss["perceptual_weight"], shipped.discriminator["ndf"]  # our defaults
        del shipped.discriminator["n_layers"]
    for section in ("loss", "regularizer", "discriminator", "perceptual"):
        assert kl[section].to_dict() == shipped[section].to_dict(), section
    vq = load(vq_f8(), tmp_path)
    build(vq)
    assert vq.regularizer.to_dict() == {
        "name": "vq", "num_codes": 16384, "beta": 0.25, "legacy": True,
    }  # fmt: skip
    assert vq.loss.regularization_weights.to_dict() == {"loss/vq": 1.0}
    assert vq.loss.reduction == "mean" and vq.discriminator.n_layers == 2


def _written(source: str, tmp_path):
    path = tmp_path / "source.py"
    path.write_text(source)
    return path


def without_sampling(sampler: str, **options: Any) -> dict[str, Any]:
    tree = sd_2_1()
    target = f"{SGM}.diffusionmodules.sampling.{sampler}"
    discretization = node(f"{SGM}.diffusionmodules.discretizer.EDMDiscretization", sigma_max=14.6)
    options |= {"num_steps": 7, "discretization_config": discretization}
    tree["model"]["params"]["sampler_config"] = node(target, **options)
    return tree


@pytest.mark.parametrize(
    ("sampler", "options", "ours"),
    [
        ("EulerEDMSampler", {"s_churn": 1.0}, "euler"),
        ("HeunEDMSampler", {"s_noise": 1.1, "s_tmin": 0.1, "s_tmax": 9.0}, "heun"),
        ("EulerAncestralSampler", {"eta": 0.5}, "euler_ancestral"),
        ("DPMPP2SAncestralSampler", {"eta": 0.5, "s_noise": 1.1}, "dpmpp_2s_ancestral"),
        ("DPMPP2MSampler", {}, "dpmpp_2m"),
        ("LinearMultistepSampler", {"order": 3}, "lms"),
    ],
)
def test_samplers_bind_with_their_options(sampler, options, ours, tmp_path):
    config = load(without_sampling(sampler, **options), tmp_path)
    assert config.sampler.to_dict() == {"name": ours, "num_steps": 7, **options}
    assert config.discretization.to_dict() == {
        "name": "edm", "sigma_min": 0.002, "sigma_max": 14.6, "rho": 7.0,
    }  # fmt: skip
    assert config.guidance.name == "none"
    assert build(config).sampling_steps == 7


@pytest.mark.parametrize(
    ("scaling", "parameterization", "denoiser"),
    [("EpsScaling", "eps", None), ("VScaling", "v", None), ("EDMScaling", "eps", "edm")],
)
def test_a_scaling_is_a_parameterization_where_there_is_one(scaling, parameterization, denoiser):
    where = "model.params.denoiser_config.params.scaling_config.target"
    tree = changed(sd_2_1(), where, f"{SGM}.diffusionmodules.denoiser_scaling.{scaling}")
    sections = parts(tree)[0][0]
    schedule = sections["schedule"]
    found = schedule["parameterization"] if "parameterization" in schedule else "eps"
    assert found == parameterization and ("denoiser" in sections) == (denoiser is not None)
    if denoiser is not None:
        assert sections["denoiser"] == {"name": "discrete", "scaling": {"name": denoiser}}


def test_guidance_needs_a_condition_that_training_drops():
    (sections, _), notes = parts(mnist())
    assert sections["guidance"] == {"name": "none"}
    assert "no embedder has a ucg_rate" in notes["model.params.sampler_config.params.guider_config"]
    assert parts(mnist_cond())[0][0]["guidance"] == {"name": "cfg", "scale": 3.0}


def test_unknown_classes_are_named_with_what_there_is():
    notes = listed(without_sampling("RestartSampler"))
    assert notes["model.params.sampler_config.target"].startswith(
        "RestartSampler is no sampler of ours; there are EulerEDMSampler, "
    )
    where = "model.params.conditioner_config.params.emb_models.0.target"
    tree = changed(sd_2_1(), where, f"{SGM}.encoders.modules.FrozenT5Embedder")
    assert listed(tree)[where].startswith("FrozenT5Embedder is no embedder of ours")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", r"x\.yaml cannot be read as YAML: .*line 1"),
        ("3", r"x\.yaml should hold a mapping with the key model, not 3"),
        ("data: {target: x}", "the YAML has no section `model`"),
        ("model: {target: ldm.Foo}", "model.target names 'Foo', which is unknown; there are Diffu"),
        ("model: 3", "model = 3 should be a mapping of options"),
        ("model: {params: {}}", "model.target names '', which is unknown"),
        ("model: {target: x.DiffusionEngine}", "model.params.network_config is missing from the Y"),
        ("model: {target: x.LatentDiffusion}", "model.params.unet_config is missing from the YAML"),
        (
            "model: {target: x.LatentDiffusion, base_learning_rate: high, params: {unet_config: "
            "{target: x.UNetModel}}}",
            "model.base_learning_rate = 'high' should be int or float",
        ),
        ("model: {target: '${a.b}'}", r"\$\{a\.b\} refers to a key that is not in the file"),
        ("a: '${a}'\nmodel: {target: x}", r"\$\{a\} refers to itself"),
        (
            "model: {target: x.DiffusionEngine, params: {network_config: {target: y.VideoUNet}}}",
            r"model\.params\.network_config\.target = 'y\.VideoUNet' is of a video model, which",
        ),
    ],
)
def test_what_cannot_be_converted_is_told_in_a_sentence(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config_from_yaml(path)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        config_from_yaml(tmp_path / "nowhere.yaml")


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {a: 1e-4, b: [1.e-6, 3E5], c: 1e4x}")
    assert read_yaml(path).values["model"] == {"a": 1e-4, "b": [1e-6, 3e5], "c": "1e4x"}
