"""All that a config says, assembled: what trains, what samples, on which data; nothing runs yet."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.data.batches import Batches
from diffusion_jax.data.latent_cache import LatentCache
from diffusion_jax.data.records import Records
from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import (
    BATCH_AXES,
    batch_sharding,
    batch_shards,
    make_mesh,
    process_rows,
    replicated,
)
from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind_section,
    check_range,
    check_section,
    check_type,
    known_sections,
    row,
)
from diffusion_jax.experiment.config.options import EmaOptions, LatentCacheOptions, PriorOptions
from diffusion_jax.experiment.data import Data, build_data, check_alike
from diffusion_jax.experiment.diffusion import make_diffusion
from diffusion_jax.experiment.first_stage import autoencoding
from diffusion_jax.experiment.first_stage.autoencoding import make_autoencoding
from diffusion_jax.experiment.hooks import HookOptions, bind_hooks
from diffusion_jax.experiment.latent_options import bind_latent_cache
from diffusion_jax.experiment.network import building
from diffusion_jax.experiment.network.cameras import degrees_read
from diffusion_jax.experiment.network.control import columns_of
from diffusion_jax.experiment.network.frames import FRAME
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.staged import staged_columns
from diffusion_jax.experiment.optimizer import bind_ema
from diffusion_jax.experiment.prior import bind_prior, rows_of
from diffusion_jax.experiment.sampling import SampleFn
from diffusion_jax.experiment.task import Drawing, Setting, Task, Training
from diffusion_jax.experiment.video import make_video
from diffusion_jax.models.conditioning.conditioner import cached_outputs
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY
from diffusion_jax.randomness import Stream, stream_key
from diffusion_jax.train.state import TrainState, abstract_state, init_sharded
from diffusion_jax.types import PyTree

# Every network that a config can name, first stages included.
MODEL = building.MODEL._replace(table={**building.MODEL.table, **autoencoding.MODEL.table})
TRAIN = Section(
    "config.train",
    "How long training goes on, with which batches, and the weights that it starts from.",
    ((Training, ()),),
)
MESH = Section(
    "config.mesh",
    "How the devices share batches, parameters and layers.",
    ((make_mesh, ("devices",)),),
)
SECTIONS = (
    "adapters checkpoint conditioning control data denoiser disc_optimizer discretization "
    "discriminator ema first_stage guidance hooks inversion latent_cache loss lr_schedule mesh "
    "model optimizer perceptual prior regularizer sampler schedule seed sigma_sampling train "
    "weighting"
).split()
REQUIRED = ("model", "data", "train")
MAX_SEED = 2**32 - 1  # jax.random.key drops what is above


class Experiment(NamedTuple):
    """What a config describes. The functions of its task are pure and not jitted, but sample_fn.

    sections: every section, None where the config has none. hooks: the options of what watches a
    run, and of its checkpoints. ema: what is kept for averages of any length. prior: which images
    the model draws and goes on learning, or None.
    """

    sections: Mapping[str, Any]
    setting: Setting
    task: Task
    hooks: HookOptions
    latent_cache: LatentCacheOptions | None = None
    ema: EmaOptions = EmaOptions()
    prior: PriorOptions | None = None

    def __repr__(self) -> str:
        """Say in one line what is trained, on what and where; the fields would fill pages."""
        name = self.sections["model"]["name"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        steps, size = self.training.num_steps, self.training.batch_size
        return f"Experiment({name} on {self.data.name}, {steps} steps of {size}, mesh {mesh})"

    @property
    def data(self) -> Data:
        """The data set, its splits and its batches."""
        return self.setting.data

    @property
    def mesh(self) -> Mesh:
        """The devices that train."""
        return self.setting.mesh

    @property
    def seed(self) -> int:
        """The seed of every random number."""
        return self.setting.seed

    @property
    def training(self) -> Training:
        """The options of config.train."""
        return self.setting.training

    @property
    def drawing(self) -> Drawing:
        """How the model draws images; ValueError for one that draws nothing on its own."""
        if self.task.drawing is None:
            raise ValueError(
                f"this config trains a first stage (config.model.name = "
                f"{self.sections['model']['name']!r}), which draws nothing on its own; name its "
                "run in config.first_stage.weights of another config"
            )
        return self.task.drawing

    @property
    def network(self) -> Network:
        """The network of a model that draws."""
        return self.drawing.network

    def with_network(self, network: Network) -> "Experiment":
        """Let the model read other words; its weights and what it computes stay."""
        drawing = self.drawing._replace(network=network)
        return self._replace(task=self.task._replace(drawing=drawing))

    @property
    def sample_fn(self) -> SampleFn:
        """The one way to draw samples; see experiment.sampling.build_sample_fn."""
        return self.drawing.sample_fn

    @property
    def init(self) -> Callable[[Array], TrainState]:
        """Make the TrainState from a key."""
        return self.task.init

    @property
    def train_step(self) -> Callable:
        """(state, batch, frozen) -> (state, metrics)."""
        return self.task.train_step

    @property
    def eval_step(self) -> Callable:
        """(params, mutable, frozen, batch, batch number) -> metrics."""
        return self.task.eval_step

    def train_batches(self, source: Records) -> Batches:
        """Make the shuffled batches of training, with all that embedders read.

        Without the rows that images of `prior` get.
        """
        given = self._batching()
        if self.prior is not None:
            given["batch_size"] -= rows_of(self.prior, self.training.batch_size)
        return self.data.train_batches(source, seed=self.seed, **given)

    def cached_batches(self, cache: LatentCache, source: Records) -> Batches:
        """Make the batches of training out of the latent cache of a source."""
        return self.data.cached_batches(cache, source, seed=self.seed, **self._batching())

    def eval_batches(self, role: str) -> Batches:
        """Make batches of each record of a split once; ConfigError without such a split."""
        return self.data.eval_batches(self.data.source(role), **self._batching())

    def _batching(self) -> dict[str, Any]:
        # Tokenising is left to the prefetching threads: the main thread must not wait for it.
        return {"batch_size": self.training.batch_size, "finish": self.task.with_inputs}

    def to_devices(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Put what the step reads of a host batch on the mesh, split over its batch axes."""
        batch = self.task.with_inputs(batch)
        embedders = self.task.embedders
        cached = [key for name in embedders for key in cached_outputs(batch, name)]
        inputs = [e.input_key for n, e in embedders.items() if not cached_outputs(batch, n)]
        counts = ["weight", "loss_mask", "loss_weight"]
        own = ["image", "moments", FRAME, *inputs, *cached, IMAGE_ONLY, *counts]
        wanted = dict.fromkeys(own)
        return shard_batch(self.mesh, {key: batch[key] for key in wanted if key in batch})

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the TrainState; nothing is computed."""
        return abstract_state(self.task.init, self.mesh, self.task.rules, self._init_key())

    def init_state(self) -> TrainState:
        """Make the initial TrainState, each leaf on its devices."""
        return init_sharded(self.task.init, self.mesh, self.task.rules, self._init_key())

    def frozen_constants(self) -> dict[str, Any]:
        """Put the constants on every device of the mesh."""
        return jax.device_put(self.task.constants, replicated(self.mesh))

    def abstract_frozen(self) -> PyTree:
        """Find shapes, dtypes and shardings of what training reads and never changes.

        These are the constants and the weights of frozen networks; nothing is computed.
        """
        rules, constants = self.task.frozen_rules, self.task.constants
        weights = abstract_state(self.task.init_frozen, self.mesh, rules, self._init_key())
        return abstract_state(lambda: constants, self.mesh) | weights

    def random_frozen(self) -> PyTree:
        """Make the constants, and random weights for frozen networks: for dry runs."""
        rules = self.task.frozen_rules
        weights = init_sharded(self.task.init_frozen, self.mesh, rules, self._init_key())
        return self.frozen_constants() | weights

    def _init_key(self) -> Array:
        return stream_key(self.seed, Stream.INITIALISATION)

    def check(self) -> TrainState:
        """Trace training and evaluation without computing; return the abstract state.

        Raises ValueError for what only shows when shapes meet, before anything is written. Training
        finds these traces again, because they are of arrays in the same places.
        """
        state, frozen = self.abstract_state(), self.abstract_frozen()
        placed = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(self.mesh))
        batch = jax.tree.map(lambda leaf: placed(leaf.shape, leaf.dtype), self.abstract_batch())
        jax.eval_shape(self.task.train_step, state, batch, frozen)
        jax.eval_shape(self.task.eval_step, state.params, state.mutable, frozen, batch, 0)
        return state

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what a training step reads of a batch."""
        size = self.training.batch_size
        inputs = jax.eval_shape(lambda: self.task.example_inputs(size))
        shape = (size, *self.data.sample_shape)
        if self.data.image_options.loss_mask is not None:
            mask = jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
            inputs = inputs | {"loss_mask": mask}
        if self.data.image_options.weight_key is not None:
            inputs = inputs | {"loss_weight": jax.ShapeDtypeStruct((size,), jnp.float32)}
        if self.prior is not None:
            inputs = inputs | {"weight": jax.ShapeDtypeStruct((size,), jnp.float32)}
        return inputs | {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def round_up(self, size: int) -> int:
        """Return the next batch size that divides by the devices of the mesh."""
        shards = batch_shards(self.mesh)
        return -(-size // shards) * shards


def assemble(sections: Mapping[str, Any], devices: Sequence[jax.Device] | None) -> Experiment:
    """Bind every section that shapes the computation; see make_experiment."""
    known_sections(sections, SECTIONS)
    for name in REQUIRED:
        if name not in sections:
            raise ConfigError(f"config.{name} is missing; every config needs {', '.join(REQUIRED)}")
    for name, section in sections.items():
        if name != "seed" and (section is not None or name in REQUIRED):
            check_section(section, f"config.{name}")
    sections = {**dict.fromkeys(SECTIONS), "seed": 0, **sections}
    seed = check_type(sections["seed"], int, "config.seed")
    check_range(seed, "config.seed", low=0, high=MAX_SEED)
    training = Training(**bind_section(TRAIN, sections["train"]).own[0])
    data = build_data(sections["data"])
    mesh = _mesh(sections["mesh"], training.batch_size, training.accumulate, devices)
    setting = Setting(data, mesh, seed, training)
    model = row(MODEL.table, sections["model"], MODEL.path, own=True)
    make = make_diffusion if data.num_frames is None else make_video
    if model in autoencoding.MODEL.table.values():
        make = make_autoencoding
    task = make(sections, setting)
    if task.drawing is None:
        check_alike(data.image_options, "the loss of a first stage")
    hooks = bind_hooks(sections, task, data.splits)
    draws = None if task.drawing is None else task.drawing.network
    data = data.with_columns(**_columns(task, data))
    setting = setting._replace(data=data)
    latent_cache = bind_latent_cache(sections, data, draws)
    prior = bind_prior(sections, data, task, training.batch_size)
    ema = bind_ema(sections["ema"])
    return Experiment(sections, setting, task, hooks, latent_cache, ema, prior)


def _columns(task: Task, data: Data) -> dict[str, Any]:
    """Find what the batches hold besides images and texts, because embedders read it."""
    embedders = task.embedders
    numbers = [e for e in embedders.values() if e.is_numbers]
    of_frames = [e.input_key for e in numbers if e.is_of_frames(data.num_frames)]
    degrees = degrees_read([e.input_key for e in numbers])
    if degrees and data.batch_options["random_flip"]:
        raise ConfigError(
            "config.data.batches.random_flip = True should be False: of a mirrored clip the angles "
            "of the cameras would be wrong"
        )
    return {
        "image_columns": (*columns_of(embedders), *staged_columns(embedders)),
        "number_columns": tuple(e.input_key for e in numbers if e.input_key not in of_frames),
        "frame_columns": (*of_frames, *degrees),
        "num_views": None if task.drawing is None else task.drawing.network.num_views,
    }


def _mesh(
    section: Mapping[str, Any] | None,
    batch_size: int,
    accumulate: int,
    devices: Sequence[Any] | None,
) -> Mesh:
    (options,) = bind_section(MESH, section).own
    mesh = make_mesh(**options, devices=devices)
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        raise ConfigError(
            f"config.train.batch_size = {batch_size} should be a multiple of "
            f"{shards * accumulate}: {shards} devices that split the batch "
            f"times config.train.accumulate = {accumulate}"
        )
    processes = jax.process_count()
    if processes > 1 and len(process_rows(mesh, batch_size)) * processes != batch_size:
        inside = {axis: size for axis, size in mesh.shape.items() if axis not in BATCH_AXES}
        asked = ", ".join(f"config.mesh.{axis} = {size}" for axis, size in inside.items())
        raise ConfigError(
            f"{asked} spans processes, which would have to "
            f"read the same samples; it should divide the {jax.local_device_count()} devices of one"
        )
    return mesh
