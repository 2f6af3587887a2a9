"""What training and files of an autoencoder of images and of one of videos do differently."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers, vae_config
from diffusion_jax.convert.weights.diffusers_video import join_vae, video_vae_config
from diffusion_jax.convert.weights.inflating import inflated
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.first_stage.regularizer import CODEBOOK
from diffusion_jax.experiment.first_stage.weights import load_first_stage, load_video_first_stage
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.train.first_stage.frames import on_frames
from diffusion_jax.types import PyTree


class Kind(NamedTuple):
    """A kind of autoencoder, as functions.

    trainable: what is trained of it by default, see Training.trainable.
    check_frames: num_frames of the data -> ConfigError where the kind does not read such data.
    input_of: image [b h w c] -> what the module reads.
    extra_inputs: (batch size, num_frames) -> zeros of what a step reads besides images.
    on_batches: (step, the place of the batch among its arguments) -> a step over batches of data.
    load: (module, params, mutable, path, training) -> see Task.load_released.
    fit_run: (module, params) -> see Task.fit_run.
    regularizers: those that diffusers has for it.
    to_diffusers: (module, components, scale_factor, num_codes) -> components as a pipeline of
      diffusers has them, and the config of their first stage. num_codes is None for a Gaussian.
    """

    trainable: str | None
    check_frames: Callable[[int | None], None]
    input_of: Callable[[Array], Array]
    extra_inputs: Callable[[int, int | None], dict[str, Array]]
    on_batches: Callable[[Callable[..., Any], int], Callable[..., Any]]
    load: Callable[..., tuple[PyTree, PyTree, list[str]]]
    fit_run: Callable[[Any, PyTree], PyTree]
    regularizers: tuple[str, ...]
    to_diffusers: Callable[..., tuple[dict[str, Any], dict[str, Any]]]


def kind_of(module: Autoencoder | VideoAutoencoder) -> Kind:
    """Find the kind of an autoencoder."""
    return _KINDS[type(module)]


def export_first_stage_folder(
    module: Autoencoder | VideoAutoencoder,
    regularizer: str,
    trained: Trained,
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a folder of diffusers with the autoencoder alone.

    It is an AutoencoderKL, a VQModel or, for videos, an AutoencoderKLTemporalDecoder.

    regularizer: its name in the config. Raises ConfigError for a quantizer that diffusers lacks,
    ValueError for such an option.
    """
    kind = kind_of(module)
    if regularizer not in kind.regularizers:
        raise ConfigError(
            f"config.regularizer.name = {regularizer!r} has no counterpart in diffusers, which has "
            f"{' and '.join(kind.regularizers)}; export this network as .safetensors"
        )
    own = trained.params["autoencoder"]
    codes = own[CODEBOOK]["embedding"].shape[0] if regularizer == "vq" else None
    components, config = kind.to_diffusers(
        module, {"first_stage": own}, scale_factor=1.0, num_codes=codes
    )
    save_diffusers(folder, components, {"first_stage": config}, dtype=dtype, nonfinite=nonfinite)


def _images_to_diffusers(
    module: Any, components: dict[str, Any], *, scale_factor: float, num_codes: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    return components, vae_config(module, scale_factor=scale_factor, num_codes=num_codes)


def _videos_to_diffusers(
    module: Any, components: dict[str, Any], *, scale_factor: float, num_codes: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Join the encoder of conditioning frames to the autoencoder, as the pipeline of videos has it.

    num_codes is always None: the autoencoder of videos has no codebook.
    """
    assert num_codes is None
    others = dict(components)
    frames = None
    if "conditioner" in components:
        others["conditioner"] = dict(components["conditioner"])
        frames = others["conditioner"].pop("frames", None)
    others["first_stage"] = join_vae(components["first_stage"], frames)
    return others, video_vae_config(module, scale_factor=scale_factor)


def _check_images(num_frames: int | None) -> None:
    if num_frames is not None:
        raise ConfigError(
            f"config.data.batches.num_frames = {num_frames} makes clips of video; the training of "
            "config.model.name = 'autoencoder' reads images, so leave it out, or choose "
            "'autoencoder_video'"
        )


def _check_clips(num_frames: int | None) -> None:
    if num_frames is None:
        raise ConfigError(
            "config.model.name = 'autoencoder_video' decodes clips of video; set "
            "config.data.batches.num_frames, the frames of a clip"
        )


def _inflated_run(module: VideoAutoencoder, params: PyTree) -> PyTree:
    """Name the parameters of a run of a first stage as an autoencoder of videos names them."""
    if "autoencoder" not in params:
        return params
    own = inflated(params["autoencoder"], use_quant_conv=module.use_quant_conv)
    return {**params, "autoencoder": own}


_KINDS: dict[type, Kind] = {
    Autoencoder: Kind(
        trainable=None,
        check_frames=_check_images,
        input_of=lambda image: image,
        extra_inputs=lambda size, num_frames: {},
        on_batches=lambda step, place: step,
        load=lambda module, *arguments: load_first_stage(*arguments),
        fit_run=lambda module, params: params,
        regularizers=("kl", "vq"),
        to_diffusers=_images_to_diffusers,
    ),
    VideoAutoencoder: Kind(
        trainable="^autoencoder/decoder/|^loss/",  # as SVD's was trained
        check_frames=_check_clips,
        input_of=lambda image: image[None],
        extra_inputs=lambda size, num_frames: {IMAGE_ONLY: jnp.zeros((size, num_frames or 1))},
        on_batches=on_frames,
        load=load_video_first_stage,
        fit_run=_inflated_run,
        regularizers=("kl",),
        to_diffusers=_videos_to_diffusers,
    ),
}
