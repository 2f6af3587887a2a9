"""The `sampler` and `guidance` sections -> the one sample_fn, through which everything samples."""

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import batch_sharding, batch_shards, on_mesh, replicated
from diffusion_jax.diffusion import guidance, samplers
from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.diffusion.samplers.variation import Variation, varied_start, varied_steps
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind_section,
    check_range,
    check_type,
    parameters_of,
)
from diffusion_jax.experiment.config.familiar import overrides_of
from diffusion_jax.experiment.config.options import SamplerOptions
from diffusion_jax.experiment.guiders import WEAKER, GuidanceScale, Guider, build_guider
from diffusion_jax.experiment.network.frames import FRAME, alternating
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.types import DURATION, Batch, Conditioning, Keys, PyTree

# Samplers that visit timesteps of the schedule, and samplers that visit noise levels.
TIMESTEP_SAMPLERS = {
    "ddpm": samplers.ddpm_ancestral,
    "ddim": samplers.ddim,
    "plms": samplers.plms,
    "dpm_solver": samplers.dpm_solver,
    "lcm": samplers.lcm,
    "tcd": samplers.tcd,
}
LEVEL_SAMPLERS = {
    "euler": samplers.euler,
    "heun": samplers.heun,
    "restart": samplers.restart,
    "euler_ancestral": samplers.euler_ancestral,
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde,
    "dpmpp_sde": samplers.dpmpp_sde,
    "unipc": samplers.unipc,
    "deis": samplers.deis,
    "lms": samplers.lms,
    "mean_flow": samplers.mean_flow,
    "consistency": samplers.consistency,
}
SAMPLERS = TIMESTEP_SAMPLERS | LEVEL_SAMPLERS
SAMPLER = Section(
    "config.sampler",
    "How samples are drawn: the steps from noise to an image.",
    ((SamplerOptions, ()),),
    SAMPLERS,
    ("schedule", "sigmas", "num_steps", "parameterization"),
    default="ddim",
    own=("schedule", "sigmas", "num_steps", "parameterization"),
)
IMAGE_SCALE = "image_scale"  # where its value for each row lies among the arrays
# See build_sample_fn.
SampleFn = Callable[..., driver.Samples]
# (params, frozen) as they are kept -> the same as Network reads them, see experiment.adapters.
Whole: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class _Plan(NamedTuple):
    """How the sections become a sampler and a guided prediction; no field is an array.

    on_stretches: whether the sampler also says where a step ends (mean_flow).
    """

    network: Network
    noise: Noise
    sampler: Callable[[Schedule, int], driver.Sampler]
    on_timesteps: bool
    guider: Guider
    on_stretches: bool


def build_sample_fn(
    network: Network,
    noise: Noise,
    sampler: Mapping[str, Any] | None,
    guider: Mapping[str, Any] | None,
    mesh: Mesh,
    whole: Whole = lambda params, frozen: (params, frozen),
) -> tuple[SampleFn, int, Callable[[int], int]]:
    """Assemble the sample_fn of a config, its default number of steps, and what counts steps.

    The last one tells how many steps the sampler takes for num_steps: most take as many, others
    more (dpmpp_sde, restart, uniform_ldm). It raises ValueError where there is no such number.

    sample_fn(params, frozen, inputs, keys, *, num_steps, guidance_scale, image_guidance_scale,
    strength, log_every, steps, size, num_frames, decode, negative, image, mask, latents, noise,
    step_noise, variation, backward, invert, watched) -> Samples, x float32 [b h w c], or [b t h w
    c] of videos. Sample i is a function of keys[i] and row i of everything else.

    inputs: what the embedders read, for example {"label": int32 [b]}. keys: one a sample.
    num_steps, guidance_scale: the config's by default. guidance_scale is one number, or one for
      each step that the sampler takes; 1 is no guidance and half the work. image_guidance_scale:
      of guidance by an image besides, see guidance.instruct_pix2pix.
    negative: inputs to guide away from, in place of dropped conditions.
    image [b h w c] in [-1, 1]: begin with this image under noise; strength in (0, 1] is the share
      of the steps that are taken. mask [b h w 1]: keep the image where it is 1.
    steps: (first, last) of those that the sampler takes, run only these. latents: x at the start of
      the first of them.
    size: (height, width) in pixels, the data's by default. num_frames: of a clip, the data's by
      default. decode=False returns x undecoded.
    noise [b h w c], step_noise [b steps h w c]: N(0, 1) noise for the start and for each step, in
      place of what the keys give.
    variation: other keys, and how far to go from the noise of `keys` to theirs.
    backward: inputs for the even steps, which see the frames of several views back in time, see
      frames.alternating.
    watched: ask samplers.watching.watch before each step whether to go on.
    invert: 0 to sample. More: go the way back, from `image` to the x from which these steps lead to
      it, and compute each of its steps so many times (samplers.inverse).

    whole: see Whole. Compiles once per (b, size, num_steps, log_every) and kind of call.
    Raises ValueError for a wrong option.
    """
    plan, default_steps = _plan(network, noise, sampler, guider, mesh)

    @functools.cache
    def count_steps(num_steps: int) -> int:
        return plan.sampler(noise.schedule, num_steps).num_steps

    run = _jit_run(plan, mesh, whole)
    sample_fn = _make_sample_fn(plan, mesh, run, default_steps, count_steps)
    return sample_fn, default_steps, count_steps


def _make_sample_fn(
    plan: _Plan,
    mesh: Mesh,
    run: Callable[..., driver.Samples],
    default_steps: int,
    count_steps: Callable[[int], int],
) -> SampleFn:
    def sample_fn(
        params: PyTree,
        frozen: PyTree,
        inputs: Mapping[str, np.ndarray | Array],
        keys: Keys,
        *,
        num_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        image_guidance_scale: float | None = None,
        strength: float | None = None,
        log_every: int | None = None,
        steps: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
        num_frames: int | None = None,
        decode: bool = True,
        negative: Mapping[str, np.ndarray | Array] | None = None,
        image: np.ndarray | Array | None = None,
        mask: np.ndarray | Array | None = None,
        latents: np.ndarray | Array | None = None,
        noise: np.ndarray | Array | None = None,
        step_noise: np.ndarray | Array | None = None,
        variation: Variation | None = None,
        backward: Mapping[str, np.ndarray | Array] | None = None,
        invert: int = 0,
        watched: bool = False,
    ) -> driver.Samples:
        num_steps = default_steps if num_steps is None else num_steps
        total, guider = count_steps(num_steps), plan.guider
        make = functools.partial(plan.sampler, plan.noise.schedule, num_steps)
        scale = guider.scale_of(guidance_scale, total, make)
        of_image = guider.image_scale_of(image_guidance_scale)
        guided = bool(np.any(scale != 1.0)) or of_image not in (None, 1.0)
        if guided and guider.weaker is not None:
            frozen = {**frozen, WEAKER: guider.weaker.params()}
        if strength is not None:
            steps = (total - driver.steps_of_strength(total, strength), total)
        optional = {
            **dict(negative=negative, image=image, mask=mask, latents=latents, noise=noise),
            **dict(step_noise=step_noise, variation=variation, backward=backward),
            IMAGE_SCALE: None if of_image is None else np.full(len(keys), of_image, np.float32),
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return run(
            params,
            frozen,
            *_place(({"inputs": dict(inputs)} | given, keys), mesh),
            jnp.asarray(scale),
            num_steps=num_steps,
            guided=guided,
            kept=_kept(plan.network, given),
            log_every=log_every,
            steps=(0, total) if steps is None else steps,
            shape=plan.network.shape_of(size, num_frames),
            decode=decode,
            invert=invert,
            watched=watched,
        )

    return sample_fn


_STATIC = "num_steps guided kept log_every steps shape decode invert watched".split()


def _jit_run(plan: _Plan, mesh: Mesh, whole: Whole) -> Callable[..., driver.Samples]:
    network = plan.network

    @functools.partial(jax.jit, static_argnames=_STATIC, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def run(params, frozen, arrays, keys, scale, *, num_steps, guided, kept, log_every, steps,
            shape, decode, invert, watched):  # fmt: skip
        params, frozen = whole(params, frozen)
        chosen = plan.sampler(frozen["schedule"], num_steps)
        if steps != (0, chosen.num_steps):
            chosen = driver.segment(chosen, *steps)
        bind = lambda inputs: _predict(  # noqa: E731
            plan,
            params,
            frozen,
            {**arrays, "inputs": network.with_conditioning_frame(inputs, keys)},
            scale if guided else None,
            kept,
        )
        predict = bind(arrays["inputs"])
        scales = scale[slice(*steps)] if guided and scale.ndim else None
        step_noise = None
        if "step_noise" in arrays:
            step_noise = jnp.moveaxis(arrays["step_noise"], 1, 0)[slice(*steps)]
        elif "variation" in arrays:
            step_noise = varied_steps(chosen, keys, arrays["variation"], shape)
        if invert:
            chosen, before = driver.inverse(chosen, invert), None
            x = network.encode_mode(frozen, arrays["image"])
            scales = None if scales is None else scales[::-1]
        else:
            x, before = _start(network, frozen, chosen, arrays, keys, shape)
        per_step: Any = scales
        if "backward" in arrays:
            times = arrays["backward"][FRAME].shape[1]
            predict = alternating(predict, bind(arrays["backward"]), times)
            per_step = {"forward": jnp.arange(*steps) % 2 == 1, "scale": scales}
        found = driver.sample(
            chosen,
            predict,
            x,
            keys,
            step_noise=step_noise,
            per_step=per_step,
            log_every=log_every,
            before_step=before,
            watched=watched,
        )
        return _decoded(network, frozen, found) if decode and not invert else found

    return run


def _plan(
    network: Network,
    noise: Noise,
    sampler: Mapping[str, Any] | None,
    guider: Mapping[str, Any] | None,
    mesh: Mesh,
) -> tuple[_Plan, int]:
    _check_familiar(sampler)
    bound = bind_section(SAMPLER, sampler)
    default_steps = SamplerOptions(**bound.own[0]).num_steps
    check_steps(default_steps, "config.sampler.num_steps")
    on_timesteps = "schedule" in parameters_of(bound.factory)
    if on_timesteps and not noise.on_timesteps:
        raise ConfigError(
            f"config.sampler.name = {bound.name!r} visits the schedule's timesteps, but "
            "config.denoiser describes a network that does not know them; choose from "
            f"{', '.join(LEVEL_SAMPLERS)}"
        )

    def make(schedule: Schedule, num_steps: int) -> driver.Sampler:
        if on_timesteps:
            return bound.make(schedule, num_steps, parameterization=noise.parameterization)
        return bound.make(noise.grid(num_steps))

    make(noise.schedule, default_steps)  # a wrong value should not wait for the first image
    on_stretches = bound.factory is samplers.mean_flow
    if on_stretches and not _reads_duration(network):
        raise ConfigError(
            "config.sampler.name = 'mean_flow' needs a network that was trained with "
            "config.loss.name = 'mean_flow', and config.model.embeds_duration is not True"
        )
    built = build_guider(guider, network, noise, bound, on_timesteps, mesh)
    if on_stretches and built.image_scale is not None:
        raise ConfigError("config.sampler.name = 'mean_flow' does not go with 'instruct_pix2pix'")
    return _Plan(network, noise, make, on_timesteps, built, on_stretches), default_steps


def names_of_samplers(network: Network, noise: Noise) -> list[str]:
    """List the samplers that fit a network and its noise levels, in the order of the alphabet."""
    fitting = SAMPLERS if noise.on_timesteps else LEVEL_SAMPLERS
    return sorted(name for name in fitting if name != "mean_flow" or _reads_duration(network))


def _reads_duration(network: Network) -> bool:
    return getattr(network.module, "embeds_duration", False)


def _check_familiar(sampler: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for a name that other tools give to a sampler, with the names here."""
    name = sampler["name"] if sampler is not None and "name" in sampler else None
    if isinstance(name, str) and name not in SAMPLERS and overrides_of(name) is not None:
        here = " ".join(overrides_of(name) or ())
        raise ConfigError(f"config.sampler.name = {name!r} is unknown; here it is {here}")


def check_steps(num_steps: Any, path: str) -> None:
    """Raise ConfigError unless num_steps is a whole number of at least 1."""
    check_range(check_type(num_steps, int, path), path, low=1)


def _kept(network: Network, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the embedders whose input a caller gave for the unconditional half."""
    negative = given["negative"] if "negative" in given else {}
    return tuple(name for name, e in network.embedders.items() if e.input_key in negative)


def _predict(
    plan: _Plan,
    params: PyTree,
    frozen: PyTree,
    arrays: Mapping[str, Any],
    scale: Array | None,
    kept: Collection[str],
) -> Callable[..., Array]:
    """Bind conditions and guidance; with a scale for each step, predict takes that as well."""
    network = plan.network

    def apply(x: Array, level: Array, conditioning: Conditioning) -> Array:
        return network.apply(params, x, level, conditioning)

    if not plan.on_timesteps:
        apply = plan.noise.denoise(apply, frozen)
    inputs: Batch = arrays["inputs"]
    conditioning = network.embed(params, frozen, inputs)
    if scale is None:
        return _over_stretches(plan, guidance.identity, apply, conditioning)
    third: Any = plan.guider.third(apply, conditioning, frozen, inputs)
    if third is None:
        if "negative" in arrays:
            inputs = {**inputs, **arrays["negative"]}
        third = network.embed(params, frozen, inputs, unconditional=True, kept=kept)
    guider = plan.guider.guide
    if IMAGE_SCALE in arrays:
        images = [name for name, e in network.embedders.items() if e.staged is not None]
        image_only = network.embed(
            params, frozen, inputs, unconditional=True, kept=(*kept, *images)
        )
        guider = functools.partial(guider, image_only=image_only, image_scale=arrays[IMAGE_SCALE])
    guide = functools.partial(_over_stretches, plan, guider, apply, conditioning, third)
    return guide(scale) if scale.ndim == 0 else lambda *args: guide(args[-1])(*args[:-1])


def _over_stretches(
    plan: _Plan, guide: Callable[..., Callable[..., Array]], apply: Any, *given: Any
) -> Callable[..., Array]:
    """Call a guider; with mean_flow, tell the network of every conditioning how long a step is."""
    if not plan.on_stretches:
        return guide(apply, *given)

    def predict(x: Array, level: Array, end: Array) -> Array:
        numbers = (plan.noise.scaling(sigma).c_noise for sigma in (level, end))
        duration = {DURATION: operator.sub(*numbers)}
        with_duration = [
            {**entry, **duration} if isinstance(entry, Mapping) else entry for entry in given
        ]
        return guide(apply, *with_duration)(x, level)

    return predict


def _start(
    network: Network,
    frozen: PyTree,
    sampler: driver.Sampler,
    arrays: Mapping[str, Any],
    keys: Keys,
    shape: tuple[int, ...],
) -> tuple[Array, driver.BeforeStep | None]:
    """Make what the first step sees, and what keeps an image in place if there is a mask."""
    if "noise" in arrays:
        noise = arrays["noise"]
    elif "variation" in arrays:
        noise = varied_start(keys, arrays["variation"], shape)
    else:
        noise = driver.initial_noise(keys, shape)
    x, before = driver.start_from_noise(sampler, noise), None
    if "image" in arrays:
        image = network.encode_mode(frozen, arrays["image"])
        if "mask" in arrays:
            rows = (*image.shape[:3], 1)
            mask = jax.image.resize(arrays["mask"], rows, "nearest")
            before = driver.inpaint(sampler.add_noise, image, mask)
        if "mask" not in arrays or sampler.first_step > 0:
            x = driver.start_from_image(sampler, image, noise)
    return (arrays["latents"] if "latents" in arrays else x), before


def _decoded(network: Network, frozen: PyTree, found: driver.Samples) -> driver.Samples:
    """Decode x and, step by step, the logged predictions; x_log stays as it is."""
    decode = functools.partial(network.decode, frozen)
    log = found.x_start_log
    if log is not None and network.first_stage is not None:
        log = jax.lax.map(decode, log)
    return found._replace(x=decode(found.x), x_start_log=log)


def _place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put host values on the mesh: split by row where the rows divide by it, else copied."""
    shards = batch_shards(mesh)

    def place(leaf: Any) -> Array:
        rows = batch_sharding(mesh) if leaf.shape[0] % shards == 0 else replicated(mesh)
        return put(leaf, rows)

    return jax.tree.map(place, tree)
