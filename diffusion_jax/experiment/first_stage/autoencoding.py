"""A config whose model is an autoencoder: the training of a first stage against a discriminator."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from diffusion_jax.convert.weights.importing import open_network
from diffusion_jax.devices.mesh import on_mesh
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section
from diffusion_jax.experiment.config.options import LearnOptions, LogvarOptions, PerceptualOptions
from diffusion_jax.experiment.files.claims import (
    Contradiction,
    autoencoder_contradictions,
    check_claims,
)
from diffusion_jax.experiment.files.weights import RANDOM, released_source
from diffusion_jax.experiment.first_stage.autoencoders import export_first_stage_folder, kind_of
from diffusion_jax.experiment.first_stage.regularizer import (
    CODEBOOK,
    Regularizer,
    build_regularizer,
)
from diffusion_jax.experiment.first_stage.weights import (
    FIRST_STAGE_LAYOUT,
    check_lpips,
    export_first_stage,
    read_lpips,
)
from diffusion_jax.experiment.network.layout import first_stage_rules
from diffusion_jax.experiment.optimizer import OPTIMIZER, bind_ema, build_optimizer
from diffusion_jax.experiment.pictures import reconstruct_pictures
from diffusion_jax.experiment.task import Reconstructing, Setting, Task, Training
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.lpips import init_lpips, lpips
from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator, fit_actnorm, unfitted
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.train.first_stage.loss import AutoencoderLoss, Networks
from diffusion_jax.train.first_stage.step import (
    TRAINED,
    averaged_params,
    init_autoencoder_state,
    init_optimizers,
    make_autoencoder_eval_step,
    make_autoencoder_step,
)
from diffusion_jax.train.optimizer import frozen_others
from diffusion_jax.train.optimizer_state import is_schedule_free
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree

# What make_autoencoding hands to make_autoencoder_step itself.
STEP_INPUTS = ("networks", "loss", "tx", "disc_tx", "seed")
MODEL = Section(
    "config.model",
    "The first stage that is trained.",
    table={"autoencoder": Autoencoder, "autoencoder_video": VideoAutoencoder},
)
LOSS = Section(
    "config.loss",
    "What the training of a first stage minimises.",
    ((LogvarOptions, ()), (LearnOptions, ()), (make_autoencoder_step, STEP_INPUTS)),
    {"autoencoder": AutoencoderLoss},
)
DISCRIMINATOR = Section(
    "config.discriminator",
    "What judges the pictures of a first stage.",
    table={"patchgan": NLayerDiscriminator},
    default="patchgan",
)
PERCEPTUAL = Section(
    "config.perceptual",
    "The perceptual distance of a first stage's loss.",
    table={"lpips": PerceptualOptions},
    default="lpips",
)
DISC_OPTIMIZER = OPTIMIZER._replace(
    path="config.disc_optimizer",
    about="The discriminator's optimizer; by default config.optimizer without the average.",
)
# Sections that the training of a diffusion model reads and this does not.
DIFFUSION_ONLY = (
    "adapters",
    "conditioning",
    "control",
    "denoiser",
    "discretization",
    "first_stage",
    "guidance",
    "inversion",
    "latent_cache",
    "prior",
    "sampler",
    "schedule",
    "sigma_sampling",
    "weighting",
)


def make_autoencoding(sections: Mapping[str, Any], setting: Setting) -> Task:
    """Make the Task of a first stage; ConfigError for a wrong option or section.

    The frames of clips are the samples of the loss; only the decoder of an autoencoder_video sees
    that they belong together.
    """
    data, mesh, seed, training = setting
    _check_sections(sections, training)
    module = bind_section(MODEL, sections["model"]).make()
    kind, frames = kind_of(module), data.num_frames
    trainable = kind.trainable if training.trainable is None else training.trainable
    kind.check_frames(frames)
    _check_image(module, data.image_shape)
    regularizer = build_regularizer(sections["regularizer"], module)
    discriminator = bind_section(DISCRIMINATOR, sections["discriminator"]).make()
    net, lpips_file = bind_section(PERCEPTUAL, sections["perceptual"]).make()
    bound = bind_section(LOSS, sections["loss"])
    loss, (logvar_init, learn, step_options) = bound.make(), bound.own
    logvar = {"logvar": jnp.float32(LogvarOptions(**logvar_init).logvar_init)}
    learn = LearnOptions(**learn).learn_logvar
    networks = _networks(module, discriminator, regularizer, net, trainable, frames)
    rate = (sections["lr_schedule"], training.batch_size, training.scale_lr)
    averages = bind_ema(sections["ema"])
    tx, lr_at = build_optimizer(sections["optimizer"], *rate, trainable=trainable, ema=averages)
    _check_trainable(module, trainable)
    disc_tx, _ = build_optimizer(_disc_optimizer(sections), *rate, path=DISC_OPTIMIZER.path)

    def init(key: Array) -> TrainState:
        params, mutable = _init_parts(module, regularizer, discriminator, data.image_shape, key)
        params["loss"] = logvar if learn else {}
        return init_autoencoder_state(params, tx, disc_tx, **mutable)

    train_step = make_autoencoder_step(networks, loss, tx, disc_tx, seed=seed, **step_options)
    eval_step = make_autoencoder_eval_step(networks, loss, seed=seed)
    compare = functools.partial(autoencoder_contradictions, module)
    train_step, eval_step = kind.on_batches(train_step, 1), kind.on_batches(eval_step, 3)
    return Task(
        init=on_mesh(mesh, init),
        init_optimizer=functools.partial(init_optimizers, tx=tx, disc_tx=disc_tx),
        train_step=on_mesh(mesh, train_step),
        eval_step=on_mesh(mesh, eval_step),
        lr_at=lr_at,
        constants={} if learn else logvar,
        init_frozen=lambda key: {"lpips": init_lpips(key, net=net)},
        rules=first_stage_rules(mesh),
        frozen_rules=(),
        embedders={},
        example_inputs=lambda size: kind.extra_inputs(size, frames),
        with_inputs=dict,
        averaged=averaged_params,
        averaged_part=lambda params: {name: params[name] for name in TRAINED},
        check_sources=functools.partial(_check_sources, net, lpips_file, training, compare),
        load_frozen=functools.partial(_load_frozen, net, lpips_file),
        load_released=functools.partial(kind.load, module),
        layout=lambda trained: FIRST_STAGE_LAYOUT,
        export_file=export_first_stage,
        export_folder=functools.partial(export_first_stage_folder, module, regularizer.name),
        pictures=functools.partial(reconstruct_pictures, networks, setting),
        headline=("loss/rec",),
        reconstructing=Reconstructing(module, networks, net),
        contradictions=compare,
        fit_run=functools.partial(kind.fit_run, module),
    )


def _init_parts(
    module: Autoencoder | VideoAutoencoder,
    regularizer: Regularizer,
    discriminator: nn.Module,
    image_shape: tuple[int, int, int],
    key: Array,
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Initialise autoencoder, codebook and discriminator, float32 -> (params, mutable)."""
    keys = jax.random.split(key, 4)
    image = jax.random.uniform(keys[3], (1, *image_shape), minval=-1.0)
    autoencoder = module.init(keys[0], kind_of(module).input_of(image))["params"]
    codebook, averages = regularizer.init(keys[1])
    judged = discriminator.init(keys[2], image, train=True)
    statistics = {name: value for name, value in judged.items() if name != "params"}
    judge = unfitted(judged["params"])  # the first batch will set up what depends on data
    params = {"autoencoder": {**autoencoder, **codebook}, "discriminator": judge}
    return params, {"regularizer": averages, "discriminator": statistics}


def _check_sources(
    net: str,
    lpips_file: str | None,
    training: Training,
    compare: Callable[[str], list[Contradiction]],
) -> None:
    source = released_source(training)
    if source is not None:
        open_network(source, "vae", variant=training.ckpt_variant)
        check_claims(compare(source) if training.ckpt_check else [], source)
    check_lpips(net, lpips_file, source)


def _load_frozen(
    net: str,
    lpips_file: str | None,
    abstract: PyTree,
    random: Callable[[], PyTree],
    source: str | os.PathLike | None,
) -> PyTree:
    if lpips_file == RANDOM:
        return {"lpips": random()["lpips"]}
    found = read_lpips(net, lpips_file, source)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract["lpips"])
    return {"lpips": jax.device_put(found, shardings)}


def _networks(
    module: Autoencoder | VideoAutoencoder,
    discriminator: NLayerDiscriminator,
    regularizer: Regularizer,
    net: str,
    trainable: str | None,
    num_frames: int | None,
) -> Networks:
    def run(method: str, params: PyTree, x: Array, dropout_key: Array | None, **clip: Any) -> Array:
        if trainable is not None:
            params = frozen_others(trainable, {"autoencoder": params})["autoencoder"]
        own = {name: value for name, value in params.items() if name != CODEBOOK}
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else {}
        out: Any = module.apply({"params": own}, x, method=method, train=train, rngs=rngs, **clip)
        return out.astype(jnp.float32)

    def decode_clips(
        params: PyTree, z: Array, dropout_key: Array | None, stills: Array | None = None
    ) -> Array:
        clips = rearrange(z, "(b t) h w c -> b t h w c", t=num_frames)
        if stills is not None:
            stills = stills.reshape(clips.shape[:2])
        frames = run("decode", params, clips, dropout_key, image_only_indicator=stills)
        return rearrange(frames, "b t h w c -> (b t) h w c")

    def discriminate(
        params: PyTree, mutable: PyTree, image: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        variables = {"params": params, **mutable}
        if train and mutable:
            return discriminator.apply(variables, image, train=True, mutable=list(mutable))
        return jnp.asarray(discriminator.apply(variables, image, train=train)), mutable

    return Networks(
        encode=functools.partial(run, "encode"),
        regularize=regularizer.apply,
        decode=functools.partial(run, "decode") if num_frames is None else decode_clips,
        discriminate=discriminate,
        lpips=functools.partial(lpips, net=net),
        last_layer=module.last_layer,
        prepare=functools.partial(fit_actnorm, discriminator)
        if discriminator.use_actnorm
        else None,
    )


def _disc_optimizer(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    own = sections["disc_optimizer"]
    if own is None:  # the average is the autoencoder's
        own = {**(sections["optimizer"] or {"name": OPTIMIZER.default}), "ema_decay": None}
    section = {"ema_decay": None, **own}
    if "name" in section and is_schedule_free(str(section["name"])):
        raise ConfigError(
            f"config.disc_optimizer.name = {section['name']!r} should be another optimizer, such "
            "as 'adamw': a discriminator is not averaged, and judges where it is trained"
        )
    if section["ema_decay"] is not None:
        raise ConfigError(
            f"config.disc_optimizer.ema_decay = {section['ema_decay']!r} should be None: the "
            "discriminator is not averaged"
        )
    return section


def _check_sections(sections: Mapping[str, Any], training: Training) -> None:
    if sections["loss"] is None:
        raise ConfigError("config.loss is missing; a first stage needs disc_start at least")
    for name in DIFFUSION_ONLY:
        if sections[name] is not None:
            raise ConfigError(
                f"config.{name} is for diffusion models, and config.model.name = 'autoencoder' "
                "trains a first stage; drop it"
            )
    if training.accumulate != 1:
        raise ConfigError(
            f"config.train.accumulate = {training.accumulate} should be 1: the weight of the "
            "adversary is one number for the whole batch, which micro-batches do not have"
        )
    if training.gradient_dtype != "float32":
        raise ConfigError(
            f"config.train.gradient_dtype = {training.gradient_dtype!r} should be 'float32' for "
            "config.model.name = 'autoencoder'"
        )
    if training.load_only_unet or training.keep_dims is not None:
        raise ConfigError(
            "config.train.load_only_unet and config.train.keep_dims are for diffusion models, and "
            "config.model.name = 'autoencoder' trains a first stage; drop them"
        )


def _check_trainable(module: Autoencoder | VideoAutoencoder, trainable: str | None) -> None:
    last = "/".join(("autoencoder", *module.last_layer))
    if trainable is not None and not re.search(trainable, last):
        raise ConfigError(
            f"config.train.trainable = {trainable!r} should be found in {last}, whose gradients "
            "weigh the adversary"
        )


def _check_image(module: Autoencoder | VideoAutoencoder, image_shape: tuple[int, int, int]) -> None:
    if module.give_pre_end:
        raise ConfigError(
            "config.model.give_pre_end = True should be False: images are what a first stage learns"
        )
    height, width, channels = image_shape
    factor = 2 ** (len(module.ch_mult) - 1)
    if height % factor or width % factor:
        raise ConfigError(
            f"config.data.batches.image_size = {(height, width)} should be a multiple of {factor}, "
            "by which config.model makes images smaller"
        )
    if (module.in_channels, module.out_ch) != (channels, channels):
        raise ConfigError(
            f"config.model.in_channels = {module.in_channels} and out_ch = {module.out_ch} should "
            f"be {channels}, the channels of the images (config.data.batches.channels)"
        )
