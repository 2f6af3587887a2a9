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
    value_of,
)
from diffusion_jax.build.data import Data, build_data
from diffusion_jax.build.network import Network, build_network
from diffusion_jax.build.noise import Noise, build_noise
from diffusion_jax.build.objective import build_objective
from diffusion_jax.build.optimizer import build_optimizer
from diffusion_jax.build.sampling import SampleFn, build_sample_fn
from diffusion_jax.data.batches import make_batches
from diffusion_jax.sharding import Rule, fsdp, make_mesh, replicated, shard_batch
from diffusion_jax.train.state import TrainState, abstract_state, init_sharded, init_state
from diffusion_jax.train.step import make_eval_step, make_train_step
from diffusion_jax.types import PyTree

# Every section of a config; build/hooks.py binds `hooks` and `checkpoint`.
SECTIONS = (
    "checkpoint conditioning data denoiser discretization first_stage guidance hooks loss "
    "lr_schedule mesh model optimizer sampler schedule seed sigma_sampling train weighting"
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
SHARDED_FROZEN = r"^(conditioner|first_stage)/"
# No training step has this number, so the keys of initialisation are those of no step.
INIT_STREAM = np.uint32(2**32 - 2)


class Training(NamedTuple):
    """The `train` section. batch_size is global; accumulate splits it into micro-batches.

    scale_lr multiplies the learning rate by the batch size. ckpt_path starts from the weights of
    another run (a folder or one of its checkpoints) or of a released file (.safetensors, .ckpt, a
    folder of diffusers), raw or, with ckpt_ema, averaged, minus ignore_keys (regular expressions
    from the start of a parameter's path, or name in a released file); load_only_unet takes the
    network alone. keep_dims: take that many input channels of the first convolution from a released
    file and start the others at 0.
    """

    num_steps: int
    batch_size: int
    accumulate: int = 1
    scale_lr: bool = False
    ckpt_path: str | None = None
    ckpt_ema: bool = False
    ignore_keys: tuple[str, ...] = ()
    load_only_unet: bool = False
    keep_dims: int | None = None


class Experiment(NamedTuple):
    """What a config describes. Functions are pure and not jitted, except sample_fn.

    init: key -> TrainState. constants: the schedule, logvar [t], sigmas, what of these training
    reads. train_step: (state, batch, frozen) -> (state, metrics). eval_step: see
    train.step.make_eval_step.
    """

    sections: Mapping[str, Any]
    seed: int
    mesh: Mesh
    rules: Sequence[Rule]
    training: Training
    network: Network
    data: Data
    noise: Noise
    tx: optax.GradientTransformation
    lr_at: Callable
    init: Callable[[Array], TrainState]
    constants: dict[str, Any]
    train_step: Callable
    eval_step: Callable
    sample_fn: SampleFn
    sampling_steps: int

    def to_devices(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Put what the step reads of a host batch on the mesh, split over its batch axes."""
        batch = self.network.with_inputs(batch)
        inputs = [embedder.input_key for embedder in self.network.embedders.values()]
        wanted = dict.fromkeys(["image", *inputs, "weight"])
        return shard_batch(self.mesh, {key: batch[key] for key in wanted if key in batch})

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the TrainState; nothing is computed."""
        return abstract_state(self.init, self.mesh, self.rules, self._init_key())

    def init_state(self) -> TrainState:
        """Make the initial TrainState, each leaf on its devices."""
        return init_sharded(self.init, self.mesh, self.rules, self._init_key())

    def frozen_constants(self) -> dict[str, Any]:
        """Put the constants on every device of the mesh."""
        return jax.device_put(self.constants, replicated(self.mesh))

    def abstract_frozen(self) -> PyTree:
        """Shapes, dtypes and shardings of what training reads and never changes: the constants and
        the weights of frozen networks, "conditioner" and "first_stage"; nothing is computed."""
        return abstract_state(self._init_frozen, self.mesh, self._frozen_rules(), self._init_key())

    def random_frozen(self) -> PyTree:
        """Make the constants, and random weights for frozen networks: for dry runs."""
        return init_sharded(self._init_frozen, self.mesh, self._frozen_rules(), self._init_key())

    def _init_frozen(self, key: Array) -> PyTree:
        return self.constants | self.network.init_frozen(key)

    def _frozen_rules(self) -> Sequence[Rule]:
        has_weights = self.network.first_stage is not None or any(
            not embedder.trainable for embedder in self.network.embedders.values()
        )
        return ((SHARDED_FROZEN, fsdp()),) if self.rules and has_weights else ()

    def _init_key(self) -> Array:
        return jax.random.fold_in(jax.random.key(self.seed), INIT_STREAM)

    def check(self) -> TrainState:
        """Trace training and evaluation without computing; return the abstract state.

        Raises ValueError for what only shows when shapes meet, before anything is written.
        """
        state, frozen = self.abstract_state(), self.abstract_frozen()
        batch = self.abstract_batch()
        jax.eval_shape(self.train_step, state, batch, frozen)
        jax.eval_shape(self.eval_step, state.params, state.mutable, frozen, batch, 0)
        return state

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what a training step reads of a batch."""
        size = self.training.batch_size
        inputs = jax.eval_shape(lambda: self.network.example_inputs(size))
        image = jax.ShapeDtypeStruct((size, *self.data.image_shape), jnp.float32)
        return inputs | {"image": image}

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
    first_stage, denoiser, grid = (
        sections[name] if name in sections else None
        for name in ("first_stage", "denoiser", "discretization")
    )
    network = build_network(
        sections["model"], sections["conditioning"], data.image_shape, first_stage
    )
    _check_buckets(data, network)
    noise = build_noise(sections["schedule"], denoiser, grid)
    objective = build_objective(network, noise, sections, training.batch_size)
    mesh = _mesh(sections["mesh"], training.batch_size, training.accumulate, devices)
    tx, lr_at = build_optimizer(
        sections["optimizer"], sections["lr_schedule"], training.batch_size, training.scale_lr
    )
    sample_fn, sampling_steps = build_sample_fn(
        network, noise, sections["sampler"], sections["guidance"], mesh
    )
    return Experiment(
        sections=sections,
        seed=seed,
        mesh=mesh,
        rules=((SHARDED, fsdp()),) if mesh.shape["fsdp"] > 1 else (),
        training=training,
        network=network,
        data=data,
        noise=noise,
        tx=tx,
        lr_at=lr_at,
        init=lambda key: init_state(network.init(key) | objective.learned, tx),
        constants=noise.constants() | objective.constants,
        train_step=make_train_step(
            objective.loss_fn, tx, seed=seed, accumulate=training.accumulate
        ),
        eval_step=make_eval_step(objective.loss_fn, seed=seed),
        sample_fn=sample_fn,
        sampling_steps=sampling_steps,
    )


def _training(section: Mapping[str, Any]) -> Training:
    training = Training(**bind(Training, section, "config.train"))
    for name in ("num_steps", "batch_size", "accumulate"):
        check_range(getattr(training, name), f"config.train.{name}", low=1)
    return training


def _check_buckets(data: Data, network: Network) -> None:
    divisor = value_of(make_batches, data.batch_options, "bucket_divisor")
    multiple = network.size_multiple()
    if value_of(make_batches, data.batch_options, "buckets") and divisor % multiple:
        raise ConfigError(
            f"config.data.batches.bucket_divisor = {divisor} should be a multiple of {multiple}, "
            "which the network asks of the sides of an image"
        )


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
