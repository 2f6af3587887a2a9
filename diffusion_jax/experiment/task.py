"""Task: what a kind of model is to everyone above it, as one record of functions.

A diffusion model and a first stage are two makers of a Task; nothing that trains, evaluates, loads,
exports or shows a model asks which of them made it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.convert.weights.lora import Lora
from diffusion_jax.convert.weights.lora_names import Spot
from diffusion_jax.devices.partition import Rule
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.files.claims import Contradiction
from diffusion_jax.experiment.network.coding import Coders
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.sampling import SampleFn, Whole
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.train.first_stage.loss import Networks
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree


class Training(NamedTuple):
    """The `train` section. batch_size is global; accumulate splits it into micro-batches.

    gradient_dtype: "bfloat16", for a network in bfloat16, rounds its kernels once a step and keeps
    their gradients in bfloat16, which halves the memory of gradients.
    scale_lr multiplies the learning rate by the batch size. ckpt_path starts from the weights of
    another run (a folder or one of its checkpoints) or of a released file (.safetensors, .ckpt, a
    folder of diffusers), raw or, with ckpt_ema, averaged, minus ignore_keys (regular expressions
    from the start of a parameter's path, or name in a released file); load_only_unet takes the
    network alone. keep_dims: take that many input channels of the first convolution from a released
    file and start the others at 0. ckpt_check refuses a released file that says of itself what the
    config contradicts, or that holds NaN or infinite numbers. ckpt_variant: "fp16" and so on, the
    files of a folder. trainable: a regular expression; only parameters in whose path it is found
    are trained, such as "time_" for the layers of a video network that mix frames. A frozen encoder
    that it names, as "^conditioner/clip/" does, is trained, too. None is all that is not frozen,
    and of an autoencoder_video the decoder.
    """

    num_steps: int
    batch_size: int
    accumulate: int = 1
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    scale_lr: bool = False
    ckpt_path: str | None = None
    ckpt_ema: bool = False
    ignore_keys: tuple[str, ...] = ()
    load_only_unet: bool = False
    keep_dims: int | None = None
    ckpt_check: bool = True
    ckpt_variant: str | None = None
    trainable: str | None = None


class Setting(NamedTuple):
    """What every maker of a Task reads besides the sections of its own."""

    data: Data
    mesh: Mesh
    seed: int
    training: Training


class Drawing(NamedTuple):
    """How a model draws images: its network, its noise levels, and the one sample_fn.

    num_steps: the default number of sampling steps. count_steps: num_steps -> how many the sampler
    takes, which may be more; ValueError where there is no such number. guides: whether guidance
    scales other than 1 mean something. coders: between images and what is denoised. whole: what a
    run keeps, (params, frozen), -> the same as network reads them.
    """

    network: Network
    noise: Noise
    sample_fn: SampleFn
    num_steps: int
    count_steps: Callable[[int], int]
    guides: bool
    coders: Coders
    whole: Whole = lambda params, frozen: (params, frozen)


class Reconstructing(NamedTuple):
    """How a model reconstructs images: an autoencoder and the networks of its training."""

    module: Autoencoder | VideoAutoencoder
    networks: Networks
    lpips_net: str


class Trained(NamedTuple):
    """The weights of a model outside of training.

    params, mutable: as in its TrainState, params raw or with the averages in their place. frozen:
    see Task.load_frozen. ema: averages to be exported beside raw params, or None.
    """

    params: PyTree
    mutable: PyTree
    frozen: PyTree
    ema: PyTree = None


class Adapters(NamedTuple):
    """What a model whose adapters are trained has beside others.

    lora: Trained -> what a LoRA file holds of it. ranks: base, {"network": ..., "conditioner": ...}
    -> the rank of each layer that is adapted.
    """

    lora: Callable[[Trained], Lora]
    ranks: Callable[[PyTree], dict[Spot, int]]


class Task(NamedTuple):
    """What is trained, as pure functions. Only makers in this package read config sections.

    init: key -> TrainState. init_optimizer: params -> the opt_state that they begin with.
      train_step: (state, batch, frozen) -> (state, metrics). eval_step: see
      train.step.make_eval_step. lr_at: step -> learning rate.
    constants: the arrays of `frozen` that the config alone decides. init_frozen: key -> random
      weights of the frozen networks. rules, frozen_rules: where the leaves of either lie.
    embedders: what conditions the model, by name. example_inputs: batch size -> zeros of all that a
      step reads from a batch besides images. with_inputs: host batch -> the batch with what
      embedders read and it lacks, such as tokens.
    averaged: state -> params with the averages in place of what is averaged. averaged_part: params
      -> the part that the average follows.
    check_sources: find out before long work whether every frozen network, and a released file that
      training starts from, is there; ValueError or FileNotFoundError if not.
    load_frozen: (abstract frozen, () -> random frozen, path of a released file or None) -> the
      frozen networks.
    load_released: (params, mutable, path, training) -> (params, mutable, what the file had not).
    layout: Trained -> the name of the layout that export_file writes; None where it cannot.
    export_file, export_folder: (Trained, path, dtype=None) -> write a .safetensors file as the
      originals do, a folder that diffusers loads; export_file returns what it wrote, in words.
    pictures: (frozen, *, max_images, class_names, and options of config.hooks.images) ->
      log_images(state, host batch) -> {key: images}.
    headline: the metrics to tell a person, by the end of their names.
    drawing, reconstructing: what of the two the model does, else None.
    first_frozen: (frozen, first batch on the devices) -> frozen, called once in a run; None where
      nothing waits for data.
    contradictions: path of a released file -> what it says of its model and the config contradicts.
    adapters: of a model whose adapters are trained.
    first_params: of a model whose train.ckpt_path is a part of frozen: (params, frozen) -> the
      params that a new run starts from.
    fit_run: the parameters of another run -> the same in the names and shapes of this model.
    """

    init: Callable[[Array], TrainState]
    init_optimizer: Callable[[PyTree], PyTree]
    train_step: Callable
    eval_step: Callable
    lr_at: Callable
    constants: dict[str, Any]
    init_frozen: Callable[[Array], PyTree]
    rules: Sequence[Rule]
    frozen_rules: Sequence[Rule]
    embedders: Mapping[str, Embedder]
    example_inputs: Callable[[int], dict[str, Array]]
    with_inputs: Callable[[Mapping[str, Any]], dict[str, Any]]
    averaged: Callable[[TrainState], PyTree]
    averaged_part: Callable[[PyTree], PyTree]
    check_sources: Callable[[], None]
    load_frozen: Callable[[PyTree, Callable[[], PyTree], str | os.PathLike | None], PyTree]
    load_released: Callable[..., tuple[PyTree, PyTree, list[str]]]
    layout: Callable[[Trained], str | None]
    export_file: Callable[..., str]
    export_folder: Callable[..., None]
    pictures: Callable[..., Callable[[TrainState, Mapping[str, Any]], dict[str, Any]]]
    headline: tuple[str, ...]
    drawing: Drawing | None = None
    reconstructing: Reconstructing | None = None
    first_frozen: Callable[[PyTree, Mapping[str, Array]], PyTree] | None = None
    contradictions: Callable[[str | os.PathLike], list[Contradiction]] = lambda path: []
    adapters: Adapters | None = None
    first_params: Callable[[PyTree, PyTree], PyTree] | None = None
    fit_run: Callable[[PyTree], PyTree] = lambda params: params
