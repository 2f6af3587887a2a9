"""All that a config says, assembled: what trains, what samples, and on which data, but nothing run
yet."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.build.binding import ConfigError, bind, check_type, known_sections, pick
from diffusion_jax.build.data import Data, build_data
from diffusion_jax.build.network import Network, build_network
from diffusion_jax.build.optimizer import build_optimizer
from diffusion_jax.build.sampling import SampleFn, build_sample_fn
from diffusion_jax.diffusion.losses import ddpm_loss
from diffusion_jax.diffusion.schedule import BETA_SCHEDULES, Schedule, make_schedule
from diffusion_jax.sharding import Rule, make_mesh, shard_batch
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
        return abstract_state(self.init, self.mesh, self.rules, jax.random.key(self.seed))

    def init_state(self) -> TrainState:
        """Make the initial TrainState, each leaf on its devices."""
        return init_sharded(self.init, self.mesh, self.rules, jax.random.key(self.seed))

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
    training = Training(**bind(Training, sections["train"], "config.train"))
    data = build_data(sections["data"])
    network = build_network(sections["model"], _section(sections, "conditioning"), data.image_shape)
    parameterization, schedule = _schedule(_section(sections, "schedule"))
    loss_options, logvar_init = _loss(_section(sections, "loss"))
    seed = sections["seed"] if "seed" in sections else 0
    mesh = _mesh(_section(sections, "mesh"), training.batch_size, training.accumulate, devices)
    tx, lr_at = build_optimizer(
        _section(sections, "optimizer"),
        _section(sections, "lr_schedule"),
        batch_size=training.batch_size,
        scale_lr=training.scale_lr,
    )
    loss_fn = diffusion_loss(
        network.apply, network.embed, parameterization=parameterization, **loss_options
    )
    learns_logvar = "learn_logvar" in loss_options and loss_options["learn_logvar"]
    logvar = jnp.full((schedule.num_timesteps,), logvar_init, jnp.float32)
    sample_fn, sampling_steps = build_sample_fn(
        network,
        _section(sections, "sampler", name="ddim", num_steps=50),
        _section(sections, "guidance", name="none"),
        schedule,
        parameterization,
        mesh,
    )

    def init(key: Array) -> TrainState:
        params = network.init(key) | ({"logvar": logvar} if learns_logvar else {})
        return init_state(params, tx)

    return Experiment(
        sections=sections,
        seed=seed,
        mesh=mesh,
        rules=(),
        training=training,
        network=network,
        data=data,
        parameterization=parameterization,
        tx=tx,
        lr_at=lr_at,
        init=init,
        frozen={"schedule": schedule, "logvar": logvar},
        train_step=make_train_step(loss_fn, tx, seed=seed, accumulate=training.accumulate),
        eval_step=make_eval_step(loss_fn, seed=seed),
        sample_fn=sample_fn,
        sampling_steps=sampling_steps,
    )


def _schedule(section: dict[str, Any]) -> tuple[str, Schedule]:
    section = {"name": "linear"} | section
    pick(BETA_SCHEDULES, section["name"], "config.schedule.name")
    keywords = bind(make_schedule, section, "config.schedule", given=("name",))
    if "parameterization" in keywords:
        parameterization = keywords["parameterization"]
    else:
        parameterization = inspect.signature(make_schedule).parameters["parameterization"].default
    return parameterization, make_schedule(section["name"], **keywords)


def _loss(section: dict[str, Any]) -> tuple[dict[str, Any], float]:
    name = section["name"] if "name" in section else "ddpm"
    loss = pick(LOSSES, name, "config.loss.name")
    logvar_init = check_type(section.pop("logvar_init", 0.0), float, "config.loss.logvar_init")
    return bind(loss, section, "config.loss", given=LOSS_INPUTS), logvar_init


def _mesh(
    section: dict[str, Any], batch_size: int, accumulate: int, devices: Sequence[Any] | None
) -> Mesh:
    mesh = make_mesh(**bind(make_mesh, section, "config.mesh", given=("devices",)), devices=devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * accumulate):
        raise ConfigError(
            f"config.train.batch_size = {batch_size} should be a multiple of "
            f"{shards * accumulate}: {shards} devices that split the batch "
            f"times config.train.accumulate = {accumulate}"
        )
    return mesh


def _section(sections: Mapping[str, Any], name_: str, **default: Any) -> dict[str, Any]:
    return dict(sections[name_]) if name_ in sections else default
