"""All that a config says, assembled: what trains, what samples, and on which data, but nothing run
yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import batch_shards, make_mesh, on_mesh, process_rows, replicated
from diffusion_jax.devices.partition import Rule
from diffusion_jax.experiment import diffusion
from diffusion_jax.experiment.autoencoding import Autoencoding, build_autoencoding, is_first_stage
from diffusion_jax.experiment.binding import (
    ConfigError,
    bind,
    check_range,
    check_type,
    known_sections,
)
from diffusion_jax.experiment.data import Data, build_data
from diffusion_jax.experiment.diffusion import Diffusion, build_diffusion
from diffusion_jax.experiment.latent_options import bind_latent_cache
from diffusion_jax.experiment.layout import first_stage_rules, frozen_rules, state_rules
from diffusion_jax.experiment.network import Network
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.options import LatentCacheOptions
from diffusion_jax.experiment.sampling import SampleFn
from diffusion_jax.models.conditioning.conditioner import cached_outputs
from diffusion_jax.train.state import TrainState, abstract_state, init_sharded
from diffusion_jax.types import PyTree

# Every section of a config; build/hooks.py binds `hooks` and `checkpoint`.
SECTIONS = (
    "checkpoint conditioning data denoiser disc_optimizer discretization discriminator first_stage "
    "guidance hooks latent_cache loss lr_schedule mesh model optimizer perceptual regularizer "
    "sampler schedule seed sigma_sampling train weighting"
).split()
REQUIRED = ("model", "data", "train")
# What a config that leaves a section out means.
DEFAULT_SECTIONS: dict[str, Any] = {
    "seed": 0,
    "optimizer": {"name": "adamw"},
    "lr_schedule": {"name": "constant"},
    "mesh": {},
}
MAX_SEED = 2**32 - 1  # jax.random.key drops what is above
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

    task: a diffusion model, or the training of a first stage. init: key -> TrainState. train_step:
    (state, batch, frozen) -> (state, metrics). eval_step: see train.step.make_eval_step.
    """

    sections: Mapping[str, Any]
    seed: int
    mesh: Mesh
    rules: Sequence[Rule]
    frozen_rules: Sequence[Rule]
    training: Training
    data: Data
    task: Diffusion | Autoencoding
    lr_at: Callable
    init: Callable[[Array], TrainState]
    train_step: Callable
    eval_step: Callable
    latent_cache: LatentCacheOptions | None = None

    @property
    def diffusion(self) -> Diffusion:
        """The task, if it is a diffusion model; ValueError for a first stage."""
        if not isinstance(self.task, Diffusion):
            raise ValueError(
                "this config trains a first stage (config.model.name = 'autoencoder'), which draws "
                "nothing on its own; name its run in config.first_stage.weights of another config"
            )
        return self.task

    @property
    def network(self) -> Network:
        """The network of a diffusion model."""
        return self.diffusion.network

    @property
    def noise(self) -> Noise:
        """The noise levels of a diffusion model."""
        return self.diffusion.noise

    @property
    def sample_fn(self) -> SampleFn:
        """The one way to draw samples from a diffusion model."""
        return self.diffusion.sample_fn

    @property
    def sampling_steps(self) -> int:
        """The number of steps of the config's sampler."""
        return self.diffusion.sampling_steps

    def to_devices(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Put what the step reads of a host batch on the mesh, split over its batch axes."""
        batch = self.task.with_inputs(batch)
        embedders = self.task.embedders
        cached = [key for name in embedders for key in cached_outputs(batch, name)]
        inputs = [e.input_key for n, e in embedders.items() if not cached_outputs(batch, n)]
        wanted = dict.fromkeys(["image", "moments", *inputs, *cached, "weight"])
        return shard_batch(self.mesh, {key: batch[key] for key in wanted if key in batch})

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the TrainState; nothing is computed."""
        return abstract_state(self.init, self.mesh, self.rules, self._init_key())

    def init_state(self) -> TrainState:
        """Make the initial TrainState, each leaf on its devices."""
        return init_sharded(self.init, self.mesh, self.rules, self._init_key())

    def frozen_constants(self) -> dict[str, Any]:
        """Put the constants on every device of the mesh."""
        return jax.device_put(self.task.constants, replicated(self.mesh))

    def abstract_frozen(self) -> PyTree:
        """Shapes, dtypes and shardings of what training reads and never changes: the constants and
        the weights of frozen networks, "conditioner" and "first_stage"; nothing is computed."""
        return abstract_state(self._init_frozen, self.mesh, self.frozen_rules, self._init_key())

    def random_frozen(self) -> PyTree:
        """Make the constants, and random weights for frozen networks: for dry runs."""
        return init_sharded(self._init_frozen, self.mesh, self.frozen_rules, self._init_key())

    def _init_frozen(self, key: Array) -> PyTree:
        return self.task.constants | self.task.init_frozen(key)

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
        inputs = jax.eval_shape(lambda: self.task.example_inputs(size))
        image = jax.ShapeDtypeStruct((size, *self.data.image_shape), jnp.float32)
        return inputs | {"image": image}

    def round_up(self, size: int) -> int:
        """Return the next batch size that divides by the devices of the mesh."""
        shards = batch_shards(self.mesh)
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
    mesh = _mesh(sections["mesh"], training.batch_size, training.accumulate, devices)
    options: dict[str, Any] = {
        "seed": seed,
        "batch_size": training.batch_size,
        "scale_lr": training.scale_lr,
        "accumulate": training.accumulate,
    }
    if is_first_stage(sections):
        if "loss" not in sections:
            raise ConfigError("config.loss is missing; a first stage needs disc_start at least")
        task, run = build_autoencoding(sections, data.image_shape, **options)
        rules, fixed = first_stage_rules(mesh), ()
    else:
        sections = diffusion.DEFAULT_SECTIONS | sections
        task, run = build_diffusion(sections, data, mesh, **options)
        rules, fixed = state_rules(task.network, mesh), frozen_rules(task.network, mesh)
    return Experiment(
        sections=sections,
        seed=seed,
        mesh=mesh,
        rules=rules,
        frozen_rules=fixed,
        training=training,
        data=data,
        task=task,
        lr_at=run.lr_at,
        init=on_mesh(mesh, run.init),
        train_step=on_mesh(mesh, run.train_step),
        eval_step=on_mesh(mesh, run.eval_step),
        latent_cache=bind_latent_cache(
            sections, data, task.network if isinstance(task, Diffusion) else None
        ),
    )


def _training(section: Mapping[str, Any]) -> Training:
    training = Training(**bind(Training, section, "config.train"))
    for name in ("num_steps", "batch_size", "accumulate"):
        check_range(getattr(training, name), f"config.train.{name}", low=1)
    return training


def _mesh(
    section: Mapping[str, Any], batch_size: int, accumulate: int, devices: Sequence[Any] | None
) -> Mesh:
    mesh = make_mesh(**bind(make_mesh, section, "config.mesh", given=("devices",)), devices=devices)
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        raise ConfigError(
            f"config.train.batch_size = {batch_size} should be a multiple of "
            f"{shards * accumulate}: {shards} devices that split the batch "
            f"times config.train.accumulate = {accumulate}"
        )
    processes = jax.process_count()
    if processes > 1 and len(process_rows(mesh, batch_size)) * processes != batch_size:
        raise ConfigError(
            f"config.mesh.tensor = {mesh.shape['tensor']} spans processes, which would have to "
            f"read the same samples; it should divide the {jax.local_device_count()} devices of one"
        )
    return mesh
