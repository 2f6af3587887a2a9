"""YAML configs as the originals have them, written down as trees, and what is done with them."""

import copy
import sys
from typing import Any

import jax
import pytest
import yaml

from diffusion_jax.convert.yaml.from_yaml import config_from_yaml, convert_sections
from diffusion_jax.convert.yaml.reading import leftovers, root_node
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config

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


def video(
    network: dict[str, Any], embedders: list[Any], guider: dict[str, Any], first_stage: Any
) -> dict[str, Any]:
    """A video model: EDM levels up to 700, and a guider with a scale for each frame."""
    kinds = f"{SGM}.diffusionmodules"
    scaling = node(f"{kinds}.denoiser_scaling.VScalingWithEDMcNoise")
    levels = node(f"{kinds}.discretizer.EDMDiscretization", sigma_max=700.0)
    unet = {
        "num_classes": "sequential", "use_checkpoint": True, "in_channels": 8, "out_channels": 4,
        "model_channels": 320, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4], "num_head_channels": 64, "use_linear_in_transformer": True,
        "transformer_depth": 1, "context_dim": 1024, "extra_ff_mix_layer": True,
        "spatial_transformer_attn_type": "softmax-xformers", "use_spatial_context": True,
    }  # fmt: skip
    kind = network.pop("kind")
    return engine(
        {}, embedders,
        network_config=node(f"{kinds}.video_model.{kind}", **unet, **network),
        denoiser_config=node(f"{kinds}.denoiser.Denoiser", scaling_config=scaling),
        scale_factor=0.18215, disable_first_stage_autocast=True, first_stage_config=first_stage,
        sampler_config=node(
            f"{kinds}.sampling.EulerEDMSampler", discretization_config=levels, guider_config=guider
        ),
    )  # fmt: skip


CODER = {
    "attn_type": "vanilla", "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3,
    "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
    "dropout": 0.0,
}  # fmt: skip
VIDEO_UNET = {
    "kind": "VideoUNet", "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1],
}  # fmt: skip


def stage_of_video(encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    return node(
        "sgm.models.autoencoder.AutoencodingEngine",
        loss_config=node("torch.nn.Identity"), encoder_config=encoder, decoder_config=decoder,
        regularizer_config=node("sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"),
    )  # fmt: skip


def frame_clip(count: int = 1) -> dict[str, Any]:
    clip = node(f"{SGM}.encoders.modules.FrozenOpenCLIPImageEmbedder", freeze=True)
    options = {"n_cond_frames": count, "n_copies": 1, "open_clip_embedding_config": clip}
    kind = "FrozenOpenCLIPImagePredictionEmbedder"
    return embedder(kind, "cond_frames_without_noise", options)


def frame_latent(key: str = "cond_frames", count: int = 1, **more: Any) -> dict[str, Any]:
    encoder = autoencoder("sgm.models.autoencoder.AutoencoderKLModeOnly", 4, [1, 2, 4, 4])
    options = {"is_ae": True, "n_cond_frames": count, "n_copies": 1, "encoder_config": encoder}
    return embedder("VideoPredictionEmbedderWithEncoder", key, options | more)


def svd() -> dict[str, Any]:
    guider = {"max_scale": 2.5, "min_scale": 1.0}
    aug = sizes("fps_id", "motion_bucket_id")
    latent = frame_latent(disable_encoder_autocast=True)
    return video(
        VIDEO_UNET | {"adm_in_channels": 768},
        [frame_clip(), *aug, latent, *sizes("cond_aug")],
        node(f"{SGM}.diffusionmodules.guiders.LinearPredictionGuider", **guider),
        stage_of_video(
            node(f"{SGM}.diffusionmodules.model.Encoder", **CODER),
            node(
                f"{SGM}.autoencoding.temporal_ae.VideoDecoder", **CODER, video_kernel_size=[3, 1, 1]
            ),
        ),
    )


IMAGE_DECODER = stage_of_video(
    node("torch.nn.Identity"), node(f"{SGM}.diffusionmodules.model.Decoder", **CODER)
)


def angles(outdim: int, *keys: str) -> list[dict[str, Any]]:
    return [embedder("ConcatTimestepEmbedderND", key, {"outdim": outdim}) for key in keys]


def sv3d_p() -> dict[str, Any]:
    return video(
        VIDEO_UNET | {"adm_in_channels": 1280},
        [
            frame_clip(), frame_latent(), *sizes("cond_aug"),
            *angles(512, "polars_rad", "azimuths_rad"),
        ],
        node(f"{SGM}.diffusionmodules.guiders.TrianglePredictionGuider", max_scale=2.5),
        copy.deepcopy(IMAGE_DECODER),
    )  # fmt: skip


def sv4d() -> dict[str, Any]:
    level = node(f"{SGM}.encoders.modules.ConcatTimestepEmbedderND", outdim=256)

    def latent(key: str, count: int, **more: Any) -> dict[str, Any]:
        zero = node(f"{SGM}.diffusionmodules.sigma_sampling.ZeroSampler")
        return frame_latent(key, count, sigma_sampler_config=zero, **more)

    guider = {"max_scale": 2.5, "num_frames": 40, "additional_cond_keys": ["cond_view"]}
    network = {
        "kind": "SpatialUNetModelWithTime", "adm_in_channels": 1280, "motion_context_dim": 4,
        "legacy": False, "replicate_time_mix_bug": True, "time_block_merge_factor": 0.0,
        "time_block_merge_strategy": "learned_with_images", "time_kernel_size": [3, 1, 1],
        "time_mix_legacy": False, "use_spatial_transformer": True, "use_motion_attention": True,
    }  # fmt: skip
    return video(
        network,
        [
            frame_clip(5), latent("cond_frames", 40, sigma_cond_config=level),
            *angles(512, "polar_rad", "azimuth_rad"),
            latent("cond_view", 8), latent("cond_motion", 5),
        ],
        node(f"{SGM}.diffusionmodules.guiders.LinearPredictionGuider", **guider),
        copy.deepcopy(IMAGE_DECODER),
    )  # fmt: skip


VIDEOS = {"svd": svd, "sv3d_p": sv3d_p, "sv4d": sv4d}
EXAMPLES = {
    example.__name__: example
    for example in (
        sd_xl_base, sd_xl_refiner, sd_2_1, v2_inference_v, v1_inference, cin256, churches,
        mnist_cond, mnist, imagenet_f8,
    )
}  # fmt: skip
ALL = EXAMPLES | VIDEOS | {"kl_f8": kl_f8, "vq_f8": vq_f8}


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


def parts(tree: Any) -> tuple[Any, dict[str, str]]:
    """Convert a tree as it is read, without its text: sections, and what is not in them."""
    root = root_node(copy.deepcopy(tree))
    return (convert_sections(root), root.chosen), dict(leftovers(root))


def listed(tree: Any) -> dict[str, str]:
    return parts(tree)[1]


def changed(tree: Any, path: str, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    inner: Any = tree
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[last] = value
    return tree


def without_sampling(sampler: str, **options: Any) -> dict[str, Any]:
    tree = sd_2_1()
    target = f"{SGM}.diffusionmodules.sampling.{sampler}"
    discretization = node(f"{SGM}.diffusionmodules.discretizer.EDMDiscretization", sigma_max=14.6)
    options |= {"num_steps": 7, "discretization_config": discretization}
    tree["model"]["params"]["sampler_config"] = node(target, **options)
    return tree


@pytest.fixture(scope="session")
def yamls():
    """The examples and functions of this file."""
    return sys.modules[__name__]


@pytest.fixture(params=ALL)
def any_example(request):
    """Each example in turn, as a tree."""
    return ALL[request.param]()
