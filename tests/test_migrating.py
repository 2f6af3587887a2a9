"""docs/migrating.md: every key of ours in it exists, and every option of the originals that the
converter knows is in it."""

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.convert.yaml import first_stage_tables as yaml_first_stage_tables
from diffusion_jax.convert.yaml import lightning_tables as yaml_lightning_tables
from diffusion_jax.convert.yaml import tables as yaml_tables
from diffusion_jax.convert.yaml import video_tables as yaml_video_tables
from diffusion_jax.convert.yaml.rows import Class
from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.images import ImageOptions
from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.diffusion.losses import ddpm_loss
from diffusion_jax.diffusion.preconditioning import SCALINGS
from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS
from diffusion_jax.diffusion.schedule import BETA_SCHEDULES, make_schedule
from diffusion_jax.diffusion.sigma_sampling import SIGMA_SAMPLINGS
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.experiment.config.options import AdapterOptions, ClipOptions, Codes
from diffusion_jax.experiment.data import Splits
from diffusion_jax.experiment.experiment import SECTIONS
from diffusion_jax.experiment.first_stage.regularizer import QUANTIZERS, REGULARIZERS
from diffusion_jax.experiment.guiders import GUIDERS
from diffusion_jax.experiment.pictures import draw_pictures
from diffusion_jax.experiment.sampling import SAMPLERS
from diffusion_jax.experiment.task import Training
from diffusion_jax.models.conditioning.embedders import EMBEDDERS
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.models.unet import MultiviewUNet, UNet, VideoUNet
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.diffusion.denoiser_loss import denoiser_loss_fn
from diffusion_jax.train.diffusion.noising import NoiseOptions
from diffusion_jax.train.first_stage.loss import AutoencoderLoss
from diffusion_jax.train.first_stage.step import make_autoencoder_step
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import scalars
from diffusion_jax.train.hooks.validation import validation
from diffusion_jax.train.lr_schedules import LR_SCHEDULES
from diffusion_jax.train.optimizer import OPTIMIZERS, make_optimizer
from diffusion_jax.train.wandb_writer import wandb_writer

TEXT = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
QUOTED = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))
OPTIMIZING = [make_optimizer, *(OPTIMIZERS[name] for name in ("adamw", "adam", "sgd"))]

# Section -> the functions that its keys are parameters of, and keys that build takes itself.
FUNCTIONS: dict[str, tuple[Iterable[Callable[..., Any]], tuple[str, ...]]] = {
    "model": ([UNet, Autoencoder, VideoUNet, MultiviewUNet], ()),
    "adapters": ([AdapterOptions], ()),
    "conditioning": ([], ("key", "embedders", "force_uc_zero")),
    "conditioning.embedders.*": (EMBEDDERS.values(), ()),
    "schedule": ([make_schedule], ()),
    "denoiser": ([], ("scaling", "discretization", "quantize_c_noise")),
    "denoiser.scaling": (SCALINGS.values(), ()),
    "discretization": (DISCRETIZATIONS.values(), ()),
    "loss": (
        [ddpm_loss, denoiser_loss_fn, NoiseOptions, AutoencoderLoss, make_autoencoder_step],
        ("learn_logvar", "logvar_init"),
    ),
    "sigma_sampling": (SIGMA_SAMPLINGS.values(), ()),
    "weighting": (WEIGHTINGS.values(), ()),
    "sampler": (SAMPLERS.values(), ()),
    "guidance": (GUIDERS.values(), ()),
    "optimizer": (OPTIMIZING, ()),
    "disc_optimizer": (OPTIMIZING, ()),
    "lr_schedule": (LR_SCHEDULES.values(), ()),
    "train": ([Training], ()),
    "mesh": ([make_mesh], ()),
    "data.splits": ([Splits], ()),
    "data.batches": ([make_batches, ImageOptions], ()),
    "data.source": ([], ("folder",)),
    "first_stage": (
        [Autoencoder, VideoAutoencoder, Codes, ClipOptions],
        ("name", "scale_factor", "scale_by_std", "weights", "samples_at_a_time"),
    ),
    "regularizer": (QUANTIZERS.values(), ("num_codes", "temperature")),
    "discriminator": ([NLayerDiscriminator], ()),
    "perceptual": ([], ("net", "weights")),
    "checkpoint": ([checkpoint, open_checkpoints], ()),
    "hooks": (
        [],
        (
            "images",
            "scalars",
            "validation",
            "profiler",
            "progress",
            "early_stopping",
            "nan_stop",
            "wandb",
        ),
    ),
    "hooks.images": ([images, draw_pictures], ()),
    "hooks.validation": ([validation], ("num_batches",)),
    "hooks.scalars": ([scalars], ()),
    "hooks.progress": ([progress], ()),
    "hooks.early_stopping": ([early_stopping], ()),
    "hooks.wandb": ([wandb_writer], ()),
}
ROWS: dict[str, Iterable[str]] = {
    "conditioning.embedders.*": EMBEDDERS,
    "schedule": BETA_SCHEDULES,
    "denoiser": ("discrete", "continuous"),
    "denoiser.scaling": SCALINGS,
    "discretization": DISCRETIZATIONS,
    "loss": ("ddpm", "denoiser", "autoencoder"),
    "sigma_sampling": SIGMA_SAMPLINGS,
    "weighting": WEIGHTINGS,
    "sampler": SAMPLERS,
    "guidance": GUIDERS,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "regularizer": REGULARIZERS,
}
# `model.params...` is a path of the originals' YAML, not of a config here.
KEYS = sorted(
    key
    for key in QUOTED
    if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[\w.*=]+", key) and not key.startswith("model.par")
)

THEIRS = {word for quoted in QUOTED - set(KEYS) for word in re.findall(r"\w+", quoted)}


def test_there_are_keys_to_check():
    assert len(KEYS) > 150


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_ours_is_an_option(key):
    path, equals, value = key.partition("=")
    section, _, name = path.rpartition(".")
    assert section in FUNCTIONS or section in ("data", "hooks"), section
    if name == "name":
        assert not equals or value in ROWS[section], value
        return
    functions, others = FUNCTIONS[section]
    known = {parameter for one in functions for parameter in inspect.signature(one).parameters}
    assert name in known | set(others), key


def options(module: Any) -> set[str]:
    """Every option of a class of the originals that a module of tables knows."""
    found: set[str] = set()
    for name, table in vars(module).items():
        if isinstance(table, dict) and not name.startswith("__"):
            for key, row in table.items():
                if isinstance(row, Class):
                    found |= set(row.options)
                elif hasattr(row, "reason") or hasattr(row, "default"):
                    found.add(key)
    return found


# The constructors of DDPM (with Stable Diffusion 2's additions), LatentDiffusion and
# DiffusionEngine, and what the converter reads without a table.
CONSTRUCTORS = """
unet_config timesteps beta_schedule loss_type ckpt_path ignore_keys load_only_unet monitor use_ema
first_stage_key image_size channels log_every_t clip_denoised linear_start linear_end cosine_s
given_betas original_elbo_weight v_posterior l_simple_weight conditioning_key parameterization
scheduler_config use_positional_encodings learn_logvar logvar_init make_it_fit ucg_training
reset_ema reset_num_ema_updates first_stage_config cond_stage_config num_timesteps_cond
cond_stage_key cond_stage_trainable concat_mode cond_stage_forward scale_factor scale_by_std
force_null_conditioning network_config denoiser_config conditioner_config sampler_config
optimizer_config loss_fn_config network_wrapper ema_decay_rate disable_first_stage_autocast
input_key log_keys no_cond_log compile_model en_and_decode_n_samples_a_time is_trainable ucg_rate
legacy_ucg_value input_keys devices gpus num_nodes accumulate_grad_batches max_steps precision
gradient_clip_val limit_val_batches val_check_interval log_every_n_steps every_n_train_steps
save_top_k mode disabled ddim_steps ddim_eta unconditional_guidance_scale betas batch_size train
validation test use_checkpoint use_fp16 use_bf16 legacy in_channels context_dim n_classes
add_sequence_dim freeze version double_z kl_weight codebook_weight lr_g_factor ema_decay
""".split()


def test_every_option_of_the_constructors_has_its_line():
    assert not set(CONSTRUCTORS) - THEIRS


@pytest.mark.parametrize(
    "module", [yaml_tables, yaml_lightning_tables, yaml_first_stage_tables, yaml_video_tables]
)
def test_every_option_of_the_originals_has_its_line(module):
    known = options(module)
    assert len(known) > 50
    assert not known - THEIRS


@pytest.mark.parametrize("flag", ["--name", "--postfix", "--logdir", "--workdir", "--resume"])
def test_the_flags_exist(flag):
    assert f"`{flag}`" in TEXT or f" {flag}" in TEXT
    assert parse_arguments(["train", f"{flag}=x"]).command == "train"
