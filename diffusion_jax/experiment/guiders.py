"""The `guidance` section -> how predictions with and without conditions are combined."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.devices.mesh import replicated
from diffusion_jax.diffusion import frame_guidance, guidance, samplers
from diffusion_jax.diffusion.samplers.by_timestep import DDIMStep
from diffusion_jax.diffusion.samplers.driver import Sampler
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.experiment.config.as_json import read_json
from diffusion_jax.experiment.config.binding import (
    Bound,
    ConfigError,
    Section,
    bind_section,
    value_of,
)
from diffusion_jax.experiment.config.files import saved_config
from diffusion_jax.experiment.config.options import AutoguidanceOptions
from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import Noise, build_noise
from diffusion_jax.models.conditioning.conditioner import can_guide
from diffusion_jax.models.unet.perturbation import identity_in_the_middle
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.train.checkpoints.reading import load_params, resolve_checkpoint
from diffusion_jax.types import Batch, Conditioning, Predict, PyTree

# These have a scale for each frame of a video.
FRAME_GUIDERS = {
    "linear": frame_guidance.linear,
    "triangle": frame_guidance.triangle,
    "trapezoid": frame_guidance.trapezoid,
    "spatiotemporal": frame_guidance.spatiotemporal,
}
GUIDERS = {
    "none": guidance.identity,
    "cfg": guidance.cfg,
    "cfgpp": guidance.cfgpp,
    "instruct_pix2pix": guidance.instruct_pix2pix,
    "embedded": guidance.embedded,
    "autoguidance": guidance.against,
    "perturbed_attention": guidance.against,
} | FRAME_GUIDERS
# These lead away from a weaker model, and need no dropped conditions.
AGAINST = ("autoguidance", "perturbed_attention")
# A network that reads the scale needs no unconditional prediction.
EMBEDDED = "embedded"
# Samplers whose steps CFG++ is known for.
CFGPP_SAMPLERS = (samplers.euler, samplers.ddim)
# Options of a guider that need predicted images, which timestep samplers do not give it.
ON_IMAGES = ("dynamic_percentile", "norm_limit")
GUIDANCE = Section(
    "config.guidance",
    "How the predictions with and without conditions are combined.",
    table=GUIDERS,
    given=("apply", "conditioning", "unconditional", "weaker", "image_only"),
    extras={"autoguidance": ((AutoguidanceOptions, ()),)},
    default="none",
    own=("apply", "conditioning", "unconditional"),
)
# A number for all steps, or a sequence of one for each; see check_scale.
GuidanceScale: TypeAlias = Any
WEAKER = "weaker"  # where the parameters of a weaker model lie in `frozen`


class Weaker(NamedTuple):
    """A weaker model: its network, its noise levels, and what reads its parameters, once.

    on_timesteps: whether it is asked for its output at timesteps, and not for denoised images.
    """

    network: Network
    noise: Noise
    on_timesteps: bool
    params: Callable[[], PyTree]

    def predict(self, frozen: PyTree, batch: Batch) -> Predict:
        """Bind its parameters, in frozen, and its own embedding of a batch."""
        network, params = self.network, frozen[WEAKER]
        conditioning = network.embed(params, frozen, batch)

        def apply(x: Array, level: Array, conditioning: Any) -> Array:
            return network.apply(params, x, level, conditioning)

        if not self.on_timesteps:
            apply = self.noise.denoise(apply, self.noise.constants())
        return guidance.identity(apply, conditioning)


class Guider(NamedTuple):
    """A bound guidance section.

    guide: (apply, conditioning, unconditional, scale) -> predict; with a weaker model its
    prediction comes in the place of the third. default_scale: where a call says none. guides:
    whether other scales than 1 mean something for this model. scales: (scale, () -> the sampler)
    -> the scales that `guide` is given. weaker: another model that is drawn with, or None.
    perturbs: whether the weaker model is this one with its middle attention perturbed.
    image_scale: the default scale of an image, for a guider that has one besides. embeds: whether
    the network itself reads the scale, and nothing else is predicted.
    """

    guide: Callable[..., Predict]
    default_scale: float
    guides: bool
    scales: Callable[[np.ndarray, Callable[[], Sampler]], np.ndarray]
    weaker: Weaker | None = None
    perturbs: bool = False
    image_scale: float | None = None
    embeds: bool = False

    def image_scale_of(self, asked: float | None) -> float | None:
        """Return the scale of the image; ValueError where a caller asks for one in vain."""
        if asked is not None and self.image_scale is None:
            raise ValueError(
                f"image_guidance_scale = {asked} does not fit: it is for models with "
                "config.guidance.name = 'instruct_pix2pix'"
            )
        return self.image_scale if asked is None else asked

    def scale_of(
        self, asked: GuidanceScale | None, num_steps: int, sampler: Callable[[], Sampler]
    ) -> np.ndarray:
        """Return the scales that `guide` is given, for one that a caller asks for; see check_scale.

        sampler: makes the sampler of num_steps steps.
        """
        scale = self.default_scale if asked is None else asked
        return self.scales(check_scale(scale, num_steps, self.guides), sampler)

    def third(
        self, apply: guidance.Apply, conditioning: Conditioning, frozen: PyTree, batch: Batch
    ) -> Predict | Conditioning | None:
        """Return what `guide` takes third; None where that is the unconditional conditioning."""
        if self.embeds:
            return conditioning
        if self.weaker is not None:
            return self.weaker.predict(frozen, batch)
        if not self.perturbs:
            return None

        def perturbed(x: Array, level: Array) -> Array:
            with identity_in_the_middle():
                return apply(x, level, conditioning)

        return perturbed


def build_guider(
    section: Mapping[str, Any] | None,
    network: Network,
    noise: Noise,
    sampler: Bound,
    on_timesteps: bool,
    mesh: Mesh,
) -> Guider:
    """Bind the `guidance` section; ConfigError for what does not fit the model or its sampler."""
    bound = bind_section(GUIDANCE, section)
    scale = scale_in(section)
    weaker = None
    if bound.name == "autoguidance":
        options = AutoguidanceOptions(**bound.extra[0])
        weaker = _weaker(options, network, noise, on_timesteps, mesh)
    if bound.name == "perturbed_attention":
        _check_middle(network)
    _check_embedded(bound.name, network)
    able = guides(section, network)
    if (scale != 1.0 or bound.name == "cfgpp") and not able:
        raise ConfigError(
            f"config.guidance.scale = {scale} needs an embedder with ucg_rate > 0: without "
            "dropped conditions in training there is no unconditional prediction to guide away from"
        )
    scales: Callable[..., np.ndarray] = lambda scale, sampler: scale  # noqa: E731
    if bound.name == "cfgpp":
        _check_cfgpp(sampler, scale)
        scales = functools.partial(_cfgpp_scales, noise.schedule)
    guide, perturbs = _guide(bound, on_timesteps, network), bound.name == "perturbed_attention"
    image_scale, embeds = _image_scale(bound, network), bound.name == EMBEDDED
    return Guider(guide, scale, able, scales, weaker, perturbs, image_scale, embeds)


def guides(section: Mapping[str, Any] | None, network: Network) -> bool:
    """Tell whether a model can be guided: it has an unconditional prediction, or a weaker model."""
    alone = (*AGAINST, EMBEDDED)
    alone = section is not None and "name" in section and section["name"] in alone
    return alone or can_guide(network.embedders)


def scale_in(section: Mapping[str, Any] | None) -> float:
    """Read the scale of a guidance section; without one the conditional prediction is followed."""
    return float(section["scale"]) if section is not None and "scale" in section else 1.0


def check_scale(scale: GuidanceScale, num_steps: int, able: bool) -> np.ndarray:
    """Return guidance scales as float32 [] or [num_steps]; ValueError for what cannot be used.

    able: whether the model can be guided, see `guides`.
    """
    if isinstance(scale, Tracer):
        raise ValueError("guidance_scale is traced by JAX and has no value yet; give a number")
    values = np.asarray(scale)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"guidance_scale = {scale!r} should be one number or one for each step")
    values = values.astype(np.float32)
    if values.shape not in ((), (num_steps,)):
        raise ValueError(
            f"guidance_scale has the shape {values.shape}; it should be one number or {num_steps}, "
            "one for each step"
        )
    if not np.all(np.isfinite(values)) or (np.any(values != 1.0) and not able):
        wanted = "finite" if able else "1: no condition was dropped in training"
        raise ValueError(f"guidance_scale = {scale} should be {wanted}")
    return values


def _guide(bound: Bound, on_timesteps: bool, network: Network) -> Callable[..., Predict]:
    if bound.factory is guidance.identity:
        return guidance.cfg  # for who asks for a scale all the same
    if bound.name in FRAME_GUIDERS and network.num_frames is None:
        raise ConfigError(
            f"config.guidance.name = {bound.name!r} has a scale for each frame of a video; images "
            "are guided by cfg"
        )
    scales = ("scale", "image_scale")
    options = {key: value for key, value in bound.keywords.items() if key not in scales}
    for name in ON_IMAGES:
        if on_timesteps and name in options:
            raise ConfigError(
                f"config.guidance.{name} = {options[name]!r} works on predicted images; choose a "
                "config.sampler.name that visits noise levels, such as euler"
            )
    return functools.partial(bound.factory, **options)


def _image_scale(bound: Bound, network: Network) -> float | None:
    if bound.factory is not guidance.instruct_pix2pix:
        return None
    images = {n: e for n, e in network.embedders.items() if e.staged is not None}
    if not can_guide(images) or network.embedders == images:
        raise ConfigError(
            "config.guidance.name = 'instruct_pix2pix' needs a text and an embedder image_latents "
            "with ucg_rate > 0: without dropped images in training there is no prediction that "
            "the image leads away from"
        )
    return float(value_of(bound.factory, bound.keywords, "image_scale"))


def _check_embedded(name: str, network: Network) -> None:
    reads = getattr(network.module, "time_cond_proj_dim", None) is not None
    if reads != (name == EMBEDDED) and name != "none":
        raise ConfigError(
            f"config.guidance.name = {name!r} should be 'embedded' with, and only with, a network "
            "that reads the scale of guidance: a UNet with config.model.time_cond_proj_dim"
        )


def _check_middle(network: Network) -> None:
    module: Any = network.module
    if not isinstance(module, UNet) or (
        module.disable_middle_transformer
        or (module.use_spatial_transformer and module.disable_middle_self_attn)
    ):
        raise ConfigError(
            "config.guidance.name = 'perturbed_attention' needs a UNet of images with "
            "self-attention in its middle block"
        )


def _check_cfgpp(sampler: Bound, scale: float) -> None:
    if not 0.0 <= scale <= 1.0:
        raise ConfigError(f"config.guidance.scale = {scale} should be between 0 and 1 for cfgpp")
    if sampler.factory not in CFGPP_SAMPLERS:
        raise ConfigError(
            f"config.guidance.name = 'cfgpp' changes a step of Euler's method or of DDIM, and "
            f"config.sampler.name is {sampler.name!r}; choose from ddim, euler"
        )
    if "clip_denoised" in sampler.keywords and sampler.keywords["clip_denoised"]:
        raise ConfigError(
            "config.sampler.clip_denoised = True should be False with config.guidance.name = "
            "'cfgpp', whose step takes two images that are predicted"
        )


def _cfgpp_scales(
    schedule: Schedule, scale: np.ndarray, sampler: Callable[[], Sampler]
) -> np.ndarray:
    """Find the level at which each step ends over the one where it begins, in sigma."""
    rows = sampler().coefficients
    if isinstance(rows, DDIMStep):
        t, signal, noise = (np.asarray(x, np.float64) for x in rows[:3])
        abar = np.asarray(schedule.alphas_cumprod, np.float64)[t.astype(int)]
        ratios = noise / signal * np.sqrt(abar / (1.0 - abar))
    else:
        ratios = np.asarray(rows.sigma_next, np.float64) / np.asarray(rows.sigma_hat)
    return guidance.cfgpp_scales(scale, ratios)


def _weaker(
    options: AutoguidanceOptions, network: Network, noise: Noise, on_timesteps: bool, mesh: Mesh
) -> Weaker:
    path = f"config.guidance.path = {options.path!r}"
    try:
        workdir, step = resolve_checkpoint(options.path)
        config = saved_config(read_json(pathlib.Path(workdir) / "config.json"), str(workdir))
    except OSError as error:
        raise ConfigError(f"{path} should be a run of a weaker model: {error}") from error
    sections = {name: None for name in ("conditioning", "schedule", "denoiser")} | config.to_dict()
    own = build_noise(sections["schedule"], sections["denoiser"], None)
    found = build_network(
        sections["model"],
        sections["conditioning"],
        network.image_shape,
        num_frames=network.num_frames,
    )
    same = own.parameterization == noise.parameterization and np.array_equal(
        own.schedule.betas, noise.schedule.betas
    )
    if on_timesteps and not (own.on_timesteps and same):
        raise ConfigError(
            f"{path} has another schedule or parameterization than this model; choose a "
            "config.sampler.name that visits noise levels, such as euler"
        )
    read = {e.input_key for e in found.embedders.values()}
    known = {e.input_key for e in network.embedders.values()}
    if not read <= known:
        raise ConfigError(
            f"{path} reads {', '.join(sorted(read - known))}, which this model's samples lack"
        )

    @functools.cache
    def params() -> PyTree:
        directory = pathlib.Path(workdir) / "checkpoints"
        held = {"conditioner": {}, **load_params(directory, step=step, ema=options.ema)}
        wanted = jax.eval_shape(found.init, jax.random.key(0))
        shapes = {name: jax.tree.map(np.shape, held[name]) for name in wanted if name in held}
        if shapes != jax.tree.map(lambda leaf: leaf.shape, wanted):
            raise ValueError(f"{path} holds other parameters than its config describes")
        return jax.device_put({name: held[name] for name in wanted}, replicated(mesh))

    return Weaker(found, own, on_timesteps, params)
