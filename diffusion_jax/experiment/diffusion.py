"""A config whose model denoises: its network, its noise, its loss and its sampler."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.data.batches import make_batches
from diffusion_jax.experiment.autoencoding import Functions
from diffusion_jax.experiment.binding import ConfigError, value_of
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.network import Network, build_network
from diffusion_jax.experiment.noise import Noise, build_noise
from diffusion_jax.experiment.objective import build_objective
from diffusion_jax.experiment.optimizer import build_optimizer
from diffusion_jax.experiment.sampling import SampleFn, build_sample_fn
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.state import TrainState, init_state
from diffusion_jax.train.step import make_eval_step, make_train_step
from diffusion_jax.types import PyTree

# What a config that leaves one of these sections out means.
DEFAULT_SECTIONS: dict[str, Any] = {
    "conditioning": {},
    "schedule": {"name": "linear"},
    "loss": {"name": "ddpm"},
    "sampler": {"name": "ddim", "num_steps": 50},
    "guidance": {"name": "none"},
}
# Sections that the training of a first stage reads and this does not.
FIRST_STAGE_ONLY = ("discriminator", "disc_optimizer", "perceptual", "regularizer")


class Diffusion(NamedTuple):
    """A network that denoises, and how samples are drawn from it.

    constants: the schedule, logvar [t] and the table of noise levels, what of these there is.
    """

    network: Network
    noise: Noise
    constants: dict[str, Any]
    sample_fn: SampleFn
    sampling_steps: int

    @property
    def embedders(self) -> Mapping[str, Embedder]:
        """What conditions the network."""
        return self.network.embedders

    def init_frozen(self, key: Array) -> PyTree:
        """Draw random weights of the frozen networks."""
        return self.network.init_frozen(key)

    def example_inputs(self, size: int) -> dict[str, Array]:
        """Zeros of the shape and dtype of everything but images that a step reads from a batch."""
        return self.network.example_inputs(size)

    def with_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a host batch what embedders read and it lacks."""
        return self.network.with_inputs(batch)

    def averaged(self, state: TrainState) -> PyTree:
        """The averages of the parameters."""
        return ema_params(state.opt_state)

    def averaged_part(self, params: PyTree) -> PyTree:
        """Pick the parameters that the average follows: all."""
        return params


def build_diffusion(
    sections: Mapping[str, Any],
    data: Data,
    mesh: Mesh,
    *,
    seed: int,
    batch_size: int,
    scale_lr: bool,
    accumulate: int,
) -> tuple[Diffusion, Functions]:
    """Build the training of a diffusion model; ConfigError for a wrong option or section."""
    for name in FIRST_STAGE_ONLY:
        if name in sections:
            raise ConfigError(
                f"config.{name} is for the training of first stages "
                f"(config.model.name = 'autoencoder'), and this is {sections['model']['name']!r}"
            )
    first_stage, denoiser, grid = (
        sections[name] if name in sections else None
        for name in ("first_stage", "denoiser", "discretization")
    )
    network = build_network(
        sections["model"], sections["conditioning"], data.image_shape, first_stage
    )
    _check_buckets(data, network)
    noise = build_noise(sections["schedule"], denoiser, grid)
    objective = build_objective(network, noise, sections, batch_size)
    tx, lr_at = build_optimizer(
        sections["optimizer"], sections["lr_schedule"], batch_size, scale_lr
    )
    sample_fn, steps = build_sample_fn(
        network, noise, sections["sampler"], sections["guidance"], mesh
    )
    constants = noise.constants() | objective.constants | network.constants()
    return Diffusion(network, noise, constants, sample_fn, steps), Functions(
        lambda key: init_state(network.init(key) | objective.learned, tx),
        make_train_step(objective.loss_fn, tx, seed=seed, accumulate=accumulate),
        make_eval_step(objective.loss_fn, seed=seed),
        lr_at,
    )


def _check_buckets(data: Data, network: Network) -> None:
    divisor = value_of(make_batches, data.batch_options, "bucket_divisor")
    multiple = network.size_multiple()
    if value_of(make_batches, data.batch_options, "buckets") and divisor % multiple:
        raise ConfigError(
            f"config.data.batches.bucket_divisor = {divisor} should be a multiple of {multiple}, "
            "which the network asks of the sides of an image"
        )
