"""A config whose model denoises: its network, its noise, its loss and its sampler, as a Task."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.convert.weights.importing import open_network
from diffusion_jax.devices.mesh import on_mesh
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.files.claims import Contradiction, check_claims, contradictions
from diffusion_jax.experiment.files.export import (
    About,
    export_diffusers,
    export_single_file,
    find_layout,
)
from diffusion_jax.experiment.files.weights import (
    check_frozen,
    denoiser_kind,
    released_source,
    scale_by_std,
)
from diffusion_jax.experiment.guiders import guides
from diffusion_jax.experiment.network.adapters import adapted
from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.experiment.network.coding import build_coders
from diffusion_jax.experiment.network.control import check_control, controlled, with_controls
from diffusion_jax.experiment.network.inversion import inverted, knowing_tokens
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.parts import Parts, all_trained, reading_of
from diffusion_jax.experiment.network.trainable import with_trainable
from diffusion_jax.experiment.noise import build_noise
from diffusion_jax.experiment.objective import build_objective, check_emphasis
from diffusion_jax.experiment.optimizer import bind_ema, build_optimizer
from diffusion_jax.experiment.pictures import draw_pictures
from diffusion_jax.experiment.sampling import build_sample_fn
from diffusion_jax.experiment.task import Drawing, Setting, Task, Trained, Training
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.options import half_kernels
from diffusion_jax.models.unet.video_unet import VideoUNet
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.optimizer import only_trainable
from diffusion_jax.train.state import init_state
from diffusion_jax.train.step import LossFn, make_eval_step, make_train_step
from diffusion_jax.types import PyTree

# Sections that train something beside weights that are frozen.
BESIDE_A_BASE = ("adapters", "control", "inversion")
# Sections that the training of a first stage reads and this does not.
FIRST_STAGE_ONLY = ("discriminator", "disc_optimizer", "perceptual", "regularizer")


def make_diffusion(sections: Mapping[str, Any], setting: Setting) -> Task:
    """Make the Task of a diffusion model of images; ConfigError for a wrong option or section."""
    network = build_network(
        sections["model"],
        sections["conditioning"],
        setting.data.image_shape,
        sections["first_stage"],
    )
    if isinstance(network.module, VideoUNet | MultiviewUNet):
        raise ConfigError(
            f"config.model.name = {sections['model']['name']!r} denoises clips of video; set "
            "config.data.batches.num_frames, the frames of a clip"
        )
    return denoising(sections, setting, with_controls(network, sections["control"]))


def denoising(
    sections: Mapping[str, Any],
    setting: Setting,
    network: Network,
    prepare: Callable[[LossFn], LossFn] = lambda loss_fn: loss_fn,
) -> Task:
    """Make the Task of a network that denoises; prepare changes what its loss sees of a batch."""
    _check_sections(sections)
    data, mesh, seed, training = setting
    network = _as_trained(network, sections, training)
    _check_buckets(data, network)
    noise = build_noise(sections["schedule"], sections["denoiser"], sections["discretization"])
    objective = build_objective(network, noise, sections, training.batch_size)
    check_emphasis(sections["loss"], data.image_options)
    tx, lr_at = build_optimizer(
        sections["optimizer"],
        sections["lr_schedule"],
        training.batch_size,
        training.scale_lr,
        trainable=training.trainable,
        ema=bind_ema(sections["ema"]),
    )
    scaled = network.first_stage is not None and network.first_stage.options.scale_by_std
    compare = functools.partial(contradictions, network, noise, sections["sampler"])
    parts = _parts(network, mesh, training, sections)
    read = (sections["sampler"], sections["guidance"], mesh, parts.whole)
    sampling = build_sample_fn(network, noise, *read)
    able, coders = guides(sections["guidance"], network), build_coders(network, mesh)
    drawing = Drawing(network, noise, *sampling, able, coders, parts.whole)
    about = About(data.name, *read[:2], drawing.num_steps)
    loss_fn = _of_whole(parts, prepare(objective.loss_fn))
    if training.trainable is not None:
        loss_fn = only_trainable(training.trainable, loss_fn)
    train_step = make_train_step(
        loss_fn, tx, seed=seed, accumulate=training.accumulate, rounded=_rounded(network, training)
    )
    return Task(
        init=on_mesh(mesh, lambda key: init_state(parts.init(key) | objective.learned, tx)),
        init_optimizer=tx.init,
        train_step=on_mesh(mesh, train_step),
        eval_step=on_mesh(mesh, make_eval_step(loss_fn, seed=seed)),
        lr_at=lr_at,
        constants=noise.constants() | objective.constants | network.constants(),
        init_frozen=parts.init_frozen,
        rules=parts.rules,
        frozen_rules=parts.frozen_rules,
        embedders=network.embedders,
        example_inputs=network.example_inputs,
        with_inputs=network.with_inputs,
        averaged=lambda state: ema_params(state.opt_state),
        averaged_part=lambda params: params,
        check_sources=functools.partial(_check_sources, network, parts, training, compare),
        load_frozen=parts.load_frozen,
        load_released=parts.load_released,
        layout=functools.partial(_layout, network, parts),
        export_file=parts.export_file
        or _merging(parts, functools.partial(export_single_file, network, noise)),
        export_folder=parts.export_folder
        or _merging(parts, functools.partial(export_diffusers, network, noise, about=about)),
        pictures=functools.partial(draw_pictures, drawing, setting),
        headline=("loss_simple", "loss_x0"),
        drawing=drawing,
        first_frozen=functools.partial(scale_by_std, network, mesh, seed) if scaled else None,
        contradictions=compare,
        adapters=parts.adapters,
        first_params=parts.first_params,
    )


def _as_trained(network: Network, sections: Mapping[str, Any], training: Training) -> Network:
    """Let tokenizers know new tokens, and encoders be trainable, as the config says."""
    network = knowing_tokens(network, sections["inversion"])
    if any(sections[name] is not None for name in BESIDE_A_BASE):
        return network
    return with_trainable(network, training.trainable)


def _parts(network: Network, mesh: Mesh, training: Training, sections: Mapping[str, Any]) -> Parts:
    """Decide what is trained: vectors of tokens, ControlNets, adapters, or else the network."""
    given = [name for name in BESIDE_A_BASE if sections[name] is not None]
    if len(given) > 1:
        raise ConfigError(
            f"config.{given[0]} cannot be trained together with config.{given[1]}: drop one"
        )
    if sections["inversion"] is not None:
        return inverted(network, mesh, training, sections)
    if sections["control"] is not None:
        check_control(sections)
        return controlled(network, mesh, training, sections["control"])
    if sections["adapters"] is not None:
        return adapted(network, mesh, training, sections)
    return all_trained(network, mesh, training)


def _check_sections(sections: Mapping[str, Any]) -> None:
    for name in FIRST_STAGE_ONLY:
        if sections[name] is not None:
            raise ConfigError(
                f"config.{name} is for the training of first stages "
                f"(config.model.name = 'autoencoder'), and this is {sections['model']['name']!r}"
            )


def _of_whole(parts: Parts, loss_fn: LossFn) -> LossFn:
    """Let a loss see the whole network where adapters are trained."""

    def loss(params: PyTree, mutable: PyTree, frozen: PyTree, *args: Any, **keywords: Any) -> Any:
        params, frozen = parts.whole(params, frozen)
        return loss_fn(params, mutable, frozen, *args, **keywords)

    return loss


def _layout(network: Network, parts: Parts, trained: Trained) -> str | None:
    if parts.layout is not None:
        return parts.layout
    params, frozen = parts.whole(trained.params, trained.frozen)
    return find_layout(network, trained._replace(params=params, frozen=frozen))


def _merging(parts: Parts, export: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that writes a model see the whole network where adapters are trained."""

    def write(trained: Trained, path: Any, *, dtype: Any = None, **options: Any) -> Any:
        return export(parts.merged(trained, dtype), path, dtype=dtype, **options)

    return write


def _rounded(network: Network, training: Training) -> Callable[[PyTree], PyTree]:
    """Find what the loss reads in place of the parameters, see Training.gradient_dtype."""
    if training.gradient_dtype == "float32":
        return lambda params: params
    dtype = jnp.dtype(getattr(network.module, "dtype", jnp.float32))
    if dtype != jnp.bfloat16:
        raise ConfigError(
            f"config.train.gradient_dtype = {training.gradient_dtype!r} should be 'float32' with "
            f"config.model.dtype = {dtype.name!r}"
        )
    return lambda params: {**params, "network": half_kernels(params["network"])}


def _check_sources(
    network: Network,
    parts: Parts,
    training: Training,
    compare: Callable[[str], list[Contradiction]],
) -> None:
    if parts.needs_base is not None and training.ckpt_path is None:
        raise ConfigError(
            f"config.train.ckpt_path is not set: {parts.needs_base} needs the weights to begin "
            "with, a file or folder that was released, or a run"
        )
    parts.check_files()
    source = released_source(training)
    if source is not None:
        open_network(source, denoiser_kind(network), variant=training.ckpt_variant)
        check_claims(compare(source) if training.ckpt_check else [], source)
    check_frozen(network, source, reading_of(training))


def _check_buckets(data: Data, network: Network) -> None:
    divisor, multiple = data.batch_options["bucket_divisor"], network.size_multiple()
    if data.batch_options["buckets"] and divisor % multiple:
        raise ConfigError(
            f"config.data.batches.bucket_divisor = {divisor} should be a multiple of {multiple}, "
            "which the network asks of the sides of an image"
        )
