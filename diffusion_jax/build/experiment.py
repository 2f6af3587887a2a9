"""All that a config says, assembled: what trains, what samples, and on which data, but nothing run
yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.build.binding import (
    ConfigError,
    bind,
    check_range,
    check_type,
    known_sections,
    row,
    value_of,
)
from diffusion_jax.build.data import Data, build_data
from diffusion_jax.build.network import Network, build_network
from diffusion_jax.build.optimizer import build_optimizer
from diffusion_jax.build.sampling import SampleFn, build_sample_fn
from diffusion_jax.diffusion.losses import ddpm_loss
from diffusion_jax.diffusion.schedule import BETA_SCHEDULES, Schedule, make_schedule
from diffusion_jax.sharding import Rule, fsdp, make_mesh, shard_batch
from diffusion_jax.train.diffusion_step import diffusion_loss
from diffusion_jax.train.state import TrainState, abstract_state, init_sharded, init_state
from diffusion_jax.train.step import make_eval_step, make_train_step
from diffusion_jax.types import PyTree

# Every section of a config; build/hooks.py binds `hooks` and `checkpoint`.
SECTIONS = (
    "checkpoint conditioning data guidance hooks loss lr_schedule mesh model optimizer sampler "
    "schedule seed train"
).split()
REQUIRED = ("model", "data", "train")
# What a config that leaves a section out means.
DEFAULT_SECTIONS: dict[str, Any] = {
    "seed": 0,
    "conditioning": {},
    "schedule": {"name": "linear"},
    "loss": {"name": "ddpm"},
    "optimizer": {"name": "adamw"},
    "lr_schedule": {"name": "constant"},
    "sampler": {"name": "ddim", "num_steps": 50},
    "guidance": {"name": "none"},
    "mesh": {},
}
MAX_SEED = 2**32 - 1  # jax.random.key drops what is above
SHARDED = r"^(params|opt_state)/"
# No training step has this number, so the keys of initialisation are those of no step.
INIT_STREAM = np.uint32(2**32 - 2)
LOSSES = {"ddpm": ddpm_loss}
# What diffusion_loss hands to a loss; everything else of its signature is an option.
LOSS_INPUTS = (
    "schedule",
    "model_output",
    "x_start",
    "x_t",
    "t",
    "noise",
    "logvar",
    "weight",
    "parameterization",
)


class Training(NamedTuple):
    """The `train` section. batch_size is global; accumulate splits it into micro-batches.

    scale_lr multiplies the learning rate by the batch size. ckpt_path starts from the weights of
    another run (a folder or one of its checkpoints), raw or, with ckpt_ema, averaged, minus
    ignore_keys (regular expressions from the start of a parameter's path); load_only_unet takes
    the network alone.
    """

    num_steps: int
    batch_size: int
    accumulate: int = 1
    scale_lr: bool = False
    ckpt_path: str | None = None
    ckpt_ema: bool = False
    ignore_keys: tuple[str, ...] = ()
    load_only_unet: bool = False


class Experiment(NamedTuple):
    """What a config describes. Functions are pure and not jitted, except sample_fn.

    init: key -> TrainState. frozen: what training reads and never changes ({"schedule": Schedule,
    "logvar": [t]}). train_step: (state, batch, frozen) -> (state, metrics). eval_step: see
    train.step.make_eval_step.
    """

    sections: Mapping[str, Any]
    seed: int
    mesh: Mesh
    rules: Sequence[Rule]
    training: Training
    network: Network
    data: Data
    parameterization: str
    tx: optax.GradientTransformation
    lr_at: Callable
    init: Callable[[Array], TrainState]
    frozen: PyTree
    train_step: Callable
    eval_step: Callable
    sample_fn: SampleFn
    sampling_steps: int

    def to_devices(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Put what the step reads of a host batch on the mesh, split over its batch axes."""
        inputs = [embedder.input_key for embedder in self.network.embedders.values()]
        wanted = dict.fromkeys(["image", *inputs, "weight"])
        return shard_batch(self.mesh, {key: batch[key] for key in wanted if key in batch})

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the TrainState; nothing is computed."""
        return abstract_state(self.init, self.mesh, self.rules, self._init_key())

    def init_state(self) -> TrainState:
        """Make the initial TrainState, each leaf on its devices."""
        return init_sharded(self.init, self.mesh, self.rules, self._init_key())

    def _init_key(self) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), INIT_STREAM)

    def check(self) -> TrainState:
        """Trace training and evaluation without computing; return the abstract state.

        Raises ValueError for what only shows when shapes meet, before anything is written.
        """
        state = self.abstract_state()
        size = self.training.batch_size
        inputs = jax.eval_shape(lambda: self.network.example_inputs(size))
        image = jax.ShapeDtypeStruct((size, *self.network.image_shape), jnp.float32)
        batch = inputs | {"image": image}
        jax.eval_shape(self.train_step, state, batch, self.frozen)
        jax.eval_shape(self.eval_step, state.params, state.mutable, self.frozen, batch, 0)
        return state

    def round_up(self, size: int) -> int:
        """Return the next batch size that divides by the devices of the mesh."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-size // shards) * shards


def assemble(sections: Mapping[str, Any], devices: Sequence[jax.Device] | None) -> Experiment:
    """Bind every section that shapes the computation; see build.experiment."""
    known_sections(sections, SECTIONS)
    for name in REQUIRED:
        if name not in sections:
            raise ConfigError(f"config.{name} is missing; every config needs {', '.join(REQUIRED)}")
    sections = DEFAULT_SECTIONS | dict(sections)
    seed = check_type(sections["seed"], int, "config.seed")
    check_range(seed, "config.seed", low=0, high=MAX_SEED)
    training = _training(sections["train"])
    data = build_data(sections["data"])
    network = build_network(sections["model"], sections["conditioning"], data.image_shape)
    parameterization, schedule = _schedule(sections["schedule"])
    loss_options, logvar_init = _loss(sections["loss"])
    mesh = _mesh(sections["mesh"], training.batch_size, training.accumulate, devices)
    tx, lr_at = build_optimizer(
        sections["optimizer"], sections["lr_schedule"], training.batch_size, training.scale_lr
    )
    loss_fn = diffusion_loss(
        network.apply, network.embed, parameterization=parameterization, **loss_options
    )
    logvar = jnp.full((schedule.num_timesteps,), logvar_init, jnp.float32)
    learned = {"logvar": logvar} if value_of(ddpm_loss, loss_options, "learn_logvar") else {}
    sample_fn, sampling_steps = build_sample_fn(
        network, sections["sampler"], sections["guidance"], schedule, parameterization, mesh
    )
    return Experiment(
        sections=sections,
        seed=seed,
        mesh=mesh,
        rules=((SHARDED, fsdp()),) if mesh.shape["fsdp"] > 1 else (),
        training=training,
        network=network,
        data=data,
        parameterization=parameterization,
        tx=tx,
        lr_at=lr_at,
        init=lambda key: init_state(network.init(key) | learned, tx),
        frozen={"schedule": schedule, "logvar": logvar},
        train_step=make_train_step(loss_fn, tx, seed=seed, accumulate=training.accumulate),
        eval_step=make_eval_step(loss_fn, seed=seed),
        sample_fn=sample_fn,
        sampling_steps=sampling_steps,
    )


def _training(section: Mapping[str, Any]) -> Training:
    training = Training(**bind(Training, section, "config.train"))
    for name in ("num_steps", "batch_size", "accumulate"):
        check_range(getattr(training, name), f"config.train.{name}", low=1)
    return training


def _schedule(section: Mapping[str, Any]) -> tuple[str, Schedule]:
    row(BETA_SCHEDULES, section, "config.schedule")
    keywords = bind(make_schedule, section, "config.schedule", given=("name",))
    parameterization = value_of(make_schedule, keywords, "parameterization")
    return parameterization, make_schedule(section["name"], **keywords)


def _loss(section: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    loss = row(LOSSES, section, "config.loss")
    section = {"logvar_init": 0.0} | dict(section)
    logvar_init = check_type(section.pop("logvar_init"), float, "config.loss.logvar_init")
    return bind(loss, section, "config.loss", given=LOSS_INPUTS), logvar_init


def _mesh(
    section: Mapping[str, Any], batch_size: int, accumulate: int, devices: Sequence[Any] | None
) -> Mesh:
    mesh = make_mesh(**bind(make_mesh, section, "config.mesh", given=("devices",)), devices=devices)
    if mesh.shape["tensor"] > 1:
        raise ConfigError(
            f"config.mesh.tensor = {mesh.shape['tensor']} should be 1: no layer has a rule for "
            "being split yet; use config.mesh.fsdp to split parameters and optimizer state"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * accumulate):
        raise ConfigError(
            f"config.train.batch_size = {batch_size} should be a multiple of "
            f"{shards * accumulate}: {shards} devices that split the batch "
            f"times config.train.accumulate = {accumulate}"
        )
    return mesh
