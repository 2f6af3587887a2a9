"""A config whose model is an autoencoder: the training of a first stage against a discriminator."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.experiment.binding import (
    ConfigError,
    bind,
    bind_shared,
    check_type,
    known_sections,
    row,
    with_dtypes,
)
from diffusion_jax.experiment.optimizer import build_optimizer
from diffusion_jax.experiment.regularizer import CODEBOOK, Regularizer, build_regularizer
from diffusion_jax.models.first_stage.autoencoder import LAST_LAYER, Autoencoder
from diffusion_jax.models.first_stage.lpips import init_lpips, lpips
from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator
from diffusion_jax.train.first_stage.loss import AutoencoderLoss, Networks
from diffusion_jax.train.first_stage.step import (
    TRAINED,
    averaged_params,
    init_autoencoder_state,
    make_autoencoder_eval_step,
    make_autoencoder_step,
)
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree

AUTOENCODERS = {"autoencoder": Autoencoder}
DISCRIMINATORS = {"patchgan": NLayerDiscriminator}
# Sections that the training of a diffusion model reads and this does not.
DIFFUSION_ONLY = (
    "conditioning",
    "denoiser",
    "discretization",
    "first_stage",
    "guidance",
    "latent_cache",
    "sampler",
    "schedule",
    "sigma_sampling",
    "weighting",
)


class Autoencoding(NamedTuple):
    """A first stage with its discriminator and its perceptual distance.

    lpips_weights: a file, None for those of the installed package, "random" for a dry run.
    """

    module: Autoencoder
    discriminator: NLayerDiscriminator
    regularizer: Regularizer
    networks: Networks
    image_shape: tuple[int, int, int]
    lpips_net: str
    lpips_weights: str | None
    constants: dict[str, Any]
    embedders: Mapping[str, Any] = {}

    def init(
        self, key: Array, tx: Any, disc_tx: Any, logvar_init: float, learn: bool
    ) -> TrainState:
        """Initialise {"autoencoder", "loss", "discriminator"} and what they need, float32."""
        keys = jax.random.split(key, 4)
        image = jax.random.uniform(keys[3], (1, *self.image_shape), minval=-1.0)
        autoencoder = self.module.init(keys[0], image)["params"]
        codebook, averages = self.regularizer.init(keys[1])
        judged = self.discriminator.init(keys[2], image, train=True)
        params = {
            "autoencoder": {**autoencoder, **codebook},
            "loss": {"logvar": jnp.float32(logvar_init)} if learn else {},
            "discriminator": judged["params"],
        }
        mutable = {k: v for k, v in judged.items() if k != "params"}
        return init_autoencoder_state(
            params, tx, disc_tx, regularizer=averages, discriminator=mutable
        )

    def init_frozen(self, key: Array) -> PyTree:
        """Draw random weights of the perceptual distance; build.weights loads the real ones."""
        return {"lpips": init_lpips(key, net=self.lpips_net)}

    def example_inputs(self, size: int) -> dict[str, Array]:
        """Nothing besides the image is read from a batch."""
        del size
        return {}

    def with_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as it is."""
        return dict(batch)

    def averaged(self, state: TrainState) -> PyTree:
        """The parameters with the averages in place of what is averaged."""
        return averaged_params(state)

    def averaged_part(self, params: PyTree) -> PyTree:
        """Pick the parameters that the average follows."""
        return {name: params[name] for name in TRAINED}


class Functions(NamedTuple):
    """What a task gives an Experiment to run."""

    init: Callable[[Array], TrainState]
    train_step: Callable
    eval_step: Callable
    lr_at: Callable


def is_first_stage(sections: Mapping[str, Any]) -> bool:
    """Tell whether a config trains a first stage."""
    model = sections["model"]
    return "name" in model and model["name"] in AUTOENCODERS


def build_autoencoding(
    sections: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    batch_size: int,
    scale_lr: bool,
    accumulate: int,
) -> tuple[Autoencoding, Functions]:
    """Build the training of a first stage; ConfigError for a wrong option or section."""
    _check_sections(sections, accumulate)
    model = sections["model"]
    module_class = row(AUTOENCODERS, model, "config.model")
    module = module_class(**bind(module_class, with_dtypes(model, "config.model"), "config.model"))
    _check_image(module, image_shape)
    section = sections["regularizer"] if "regularizer" in sections else {"name": "kl"}
    regularizer = build_regularizer(section, module)
    discriminator = _discriminator(sections)
    net, weights = _perceptual(sections)
    loss, step_options, logvar_init, learn = _loss(sections["loss"])
    networks = _networks(module, discriminator, regularizer, net)
    tx, lr_at = build_optimizer(
        sections["optimizer"], sections["lr_schedule"], batch_size, scale_lr
    )
    disc_tx, _ = build_optimizer(
        _disc_optimizer(sections), sections["lr_schedule"], batch_size, scale_lr
    )
    constants = {} if learn else {"logvar": jnp.float32(logvar_init)}
    task = Autoencoding(
        module, discriminator, regularizer, networks, image_shape, net, weights, constants
    )
    return task, Functions(
        lambda key: task.init(key, tx, disc_tx, logvar_init, learn),
        make_autoencoder_step(networks, loss, tx, disc_tx, seed=seed, **step_options),
        make_autoencoder_eval_step(networks, loss, seed=seed),
        lr_at,
    )


def _networks(
    module: Autoencoder, discriminator: nn.Module, regularizer: Regularizer, net: str
) -> Networks:
    def run(method: str, params: PyTree, x: Array, dropout_key: Array | None) -> Array:
        own = {name: value for name, value in params.items() if name != CODEBOOK}
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else {}
        out: Any = module.apply({"params": own}, x, method=method, train=train, rngs=rngs)
        return out.astype(jnp.float32)

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
        decode=functools.partial(run, "decode"),
        discriminate=discriminate,
        lpips=functools.partial(lpips, net=net),
        last_layer=LAST_LAYER,
    )


def _loss(section: Mapping[str, Any]) -> tuple[AutoencoderLoss, dict[str, Any], float, bool]:
    path = "config.loss"
    section = {"logvar_init": 0.0, "learn_logvar": False} | dict(section)
    row({"autoencoder": AutoencoderLoss}, section, path)
    logvar_init = check_type(section.pop("logvar_init"), float, f"{path}.logvar_init")
    learn = check_type(section.pop("learn_logvar"), bool, f"{path}.learn_logvar")
    given = ("networks", "loss", "tx", "disc_tx", "seed")
    loss, step = bind_shared(section, path, (AutoencoderLoss, ()), (make_autoencoder_step, given))
    return AutoencoderLoss(**loss), step, logvar_init, learn


def _discriminator(sections: Mapping[str, Any]) -> NLayerDiscriminator:
    path = "config.discriminator"
    section = sections["discriminator"] if "discriminator" in sections else {"name": "patchgan"}
    module_class = row(DISCRIMINATORS, section, path)
    return module_class(**bind(module_class, with_dtypes(section, path), path))


def _perceptual(sections: Mapping[str, Any]) -> tuple[str, str | None]:
    path = "config.perceptual"
    section = dict(sections["perceptual"]) if "perceptual" in sections else {"name": "lpips"}
    row({"lpips": lpips}, section, path)
    known_sections(section, ("name", "net", "weights"), path)
    section = {"net": "vgg16", "weights": None} | section
    net = check_type(section["net"], str, f"{path}.net")
    if net not in ("vgg16", "alexnet"):
        raise ConfigError(f"{path}.net = {net!r} is unknown; choose from alexnet, vgg16")
    return net, check_type(section["weights"], str | None, f"{path}.weights")


def _disc_optimizer(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    if "disc_optimizer" not in sections:
        return {**sections["optimizer"], "ema_decay": None}  # the average is the autoencoder's
    section = {"ema_decay": None} | dict(sections["disc_optimizer"])
    if section["ema_decay"] is not None:
        raise ConfigError(
            f"config.disc_optimizer.ema_decay = {section['ema_decay']!r} should be None: the "
            "discriminator is not averaged"
        )
    return section


def _check_sections(sections: Mapping[str, Any], accumulate: int) -> None:
    for name in DIFFUSION_ONLY:
        if name in sections:
            raise ConfigError(
                f"config.{name} is for diffusion models, and config.model.name = 'autoencoder' "
                "trains a first stage; drop it"
            )
    if accumulate != 1:
        raise ConfigError(
            f"config.train.accumulate = {accumulate} should be 1: the weight of the adversary is "
            "one number for the whole batch, which micro-batches do not have"
        )


def _check_image(module: Autoencoder, image_shape: tuple[int, int, int]) -> None:
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
