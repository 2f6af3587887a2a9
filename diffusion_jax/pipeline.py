"""The programmatic sampling API: a trained model as a function from conditions to uint8 images."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import ml_collections
import numpy as np

from diffusion_jax.convert.weights.embeddings import read_embedding
from diffusion_jax.diffusion.samplers.driver import check_iterations
from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.files.lora import with_loras
from diffusion_jax.experiment.guiders import GuidanceScale
from diffusion_jax.experiment.network.inversion import with_embedding
from diffusion_jax.runs.beginning.start import open_run
from diffusion_jax.runs.drawing.coding import decode_latents, encode_images
from diffusion_jax.runs.drawing.draw import (
    NonFiniteWarning,
    draw_rows,
    warn_of_non_finite,
)
from diffusion_jax.runs.drawing.views import check_unset, draw_views
from diffusion_jax.runs.drawing.watched import OnStep
from diffusion_jax.runs.files.native import find_about
from diffusion_jax.runs.files.released import config_for
from diffusion_jax.runs.inputs.arrays import (
    Number,
    Picture,
    Whole,
    as_image,
    as_noises,
    number,
    steps_of_call,
    steps_of_shares,
    whole_number,
)
from diffusion_jax.runs.inputs.conditions import (
    Conditions,
    encode_conditions,
    encode_negative,
    required_inputs,
)
from diffusion_jax.runs.inputs.control import ControlImage, ControlScale, with_control
from diffusion_jax.runs.inputs.fitting import Resize
from diffusion_jax.runs.inputs.frames import check_frames, clip_conditions, with_picture
from diffusion_jax.runs.inputs.prompts import alike
from diffusion_jax.runs.inputs.redrawing import (
    check_pictures,
    finished,
    for_sampler,
    image_inputs,
    pictures_of_call,
)
from diffusion_jax.runs.inputs.seeds import Seed, Seeds, check_seeds
from diffusion_jax.runs.inputs.sizes import check_num_steps, check_size, check_sizes
from diffusion_jax.runs.weights import load_checkpoint_file, load_trained
from diffusion_jax.train.pictures import to_pixels
from diffusion_jax.types import PyTree

__all__ = ["NonFiniteWarning", "Pipeline", "with_files"]


class Pipeline(NamedTuple):
    """A model ready to sample. Make one with from_workdir or from_checkpoint; call it for images.

    >>> pipe = Pipeline.from_workdir("runs/mnist")
    >>> images = pipe([7, 7, 3], num_steps=50, guidance_scale=3.0, seed=0)  # uint8 [3, 28, 28, 1]

    The options of a call:

    conditions: a prompt, class number or name for each image, or a dict by input; None for an
        unconditional model. n: images for one condition or none.
    negative: what guidance leads away from, a prompt or a dict by input; None is the condition
        that training dropped.
    prompt_weights: whether brackets weigh words of prompts, (word:1.2), (word) and [word], see
        data.prompt_weights; None is what the model was trained with. Prompts longer than the text
        encoder reads are encoded in windows, and all of a call in equally many.
    num_steps, guidance_scale: the config's when None. A scale of 1 is no guidance, 0 ignores
        the conditions; a sequence has one scale for each step that the sampler takes, which
        is num_steps but for dpmpp_sde, restart and ddim's uniform_ldm.
    seed: any integer; image i depends on (seed, i) only, whatever B and batch_size are. None
        draws one, and the log says which. A sequence has one for each image, which is the first
        image of this seed.
    variation_seed, variation_strength: other seeds, and how far to go towards their noise, from
        0, the images of `seed`, to 1, the ones of variation_seed.
    batch_size: images or videos per device call, 64 or 1 when None; memory grows with it.
    height, width: pixels, the config's when None.
    image: uint8 [B, H, W, C] or [H, W, C], or a PIL image. With strength in (0, 1] it is where
        sampling begins: the image under noise, and that share of the steps. With mask it is
        kept where the mask is 1 (inpainting); see runs.inputs.as_mask for what may be a mask.
        Both may be given. A model for inpainting reads both, and one for edits the image.
    resize: how an image of another size becomes one of height x width pixels, and its mask with
        it: "resize" (as None) changes both sides independently, "crop" cuts its middle, "pad"
        repeats its edges around the whole of it, and the mask does not keep them; the log says so.
        With an image, height and width may be any: the network works on the next multiples of what
        it can, and what is drawn is cut to exactly height x width.
    image_guidance_scale: of a model for edits, how much the result is like the image; 1 to 2 is
        usual, None is the config's.
    denoising_start, denoising_end: run only this share of the steps. What a model leaves at
        denoising_end with output="latents", float32 x [B, h, w, c] as the network works on it,
        is what a refiner takes as `latents` at the same denoising_start.
    latents: x at denoising_start, from such a call or from `invert`.
    control_image, conditioning_scale: what ControlNets see, and how much they count (1 when None):
        see runs.control.with_control.
    num_frames, fps, motion_bucket_id, cond_aug: of a model of videos, the config's when None. Its
        conditions are pictures, or a dict with them as "image"; it draws uint8 [B, T, H, W, C].
        fps is SVD's fps_id, frames per second less 1; cond_aug is the noise on the picture. A model
        of several views (SV4D) draws a clip of one video for each new view: runs.views.draw_views.
    on_step: called with (steps done, steps in all) before each step, from another thread; False
        stops, and the call raises Stopped.
    noise, step_noise: float [B, h, w, c] and [B, steps, h, w, c], N(0, 1): the noise of the
        start and of each step, instead of what `seed` gives.
    """

    experiment: Experiment
    params: PyTree
    frozen: PyTree
    class_names: tuple[str, ...] | None = None

    @classmethod
    def from_workdir(
        cls,
        workdir: str | os.PathLike,
        *,
        step: int | None = None,
        ema: bool = True,
        overrides: Sequence[str] | Mapping[str, Any] = (),
    ) -> "Pipeline":
        """Load the weights of a run, averaged or raw.

        step: the number of a checkpoint, the newest when None. overrides: of the run's config, such
        as {"sampler.name": "euler"} or "--config.sampler.name=euler"; sampler, guidance,
        discretization and data may be changed, what was trained may not.
        Raises FileNotFoundError when the folder holds no run or no such checkpoint, ValueError
        when it is damaged.
        """
        workdir = pathlib.Path(workdir)
        built, metadata = open_run(workdir, overrides, step)
        trained = load_trained(built, workdir, step=step, ema=ema)
        names = tuple(metadata["class_names"]) if "class_names" in metadata else None
        return cls(built, trained.params, trained.frozen, names)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        config: str | ml_collections.ConfigDict | None = None,
        *,
        overrides: Sequence[str] = (),
        ema: bool = False,
    ) -> "Pipeline":
        """Load a native file of a run, or released weights: a file, or a folder of diffusers.

        config: the path of a config file, with its variant if any ("configs/sdxl.py"), and
        overrides for it ("--config.sampler.num_steps=30"), or a ConfigDict; None is the config in
        a native file, or the shipped one that describes the file, as far as it says of itself. A
        frozen network whose config names a weights file is read from that. ema takes the averages
        that training files (.ckpt) and native files with both keep of the network.
        Raises FileNotFoundError for a missing file, ValueError when the file is damaged or does not
        fit the config; the message says what it is, or what is missing or left over.
        """
        if not isinstance(config, ml_collections.ConfigDict):
            config = config_for(path, config, overrides)
        elif overrides:
            raise ValueError(f"overrides = {overrides!r} are for the path of a config file")
        built = make_experiment(config)
        trained, _ = load_checkpoint_file(built, path, ema=ema)
        about = find_about(path)
        names = None if about is None else about.class_names
        return cls(built, trained.params, trained.frozen, names)

    def with_lora(self, loras: Mapping[str | os.PathLike, float]) -> "Pipeline":
        """Add LoRA files, each times a number, such as {"style.safetensors": 0.8}."""
        found = with_loras(self.experiment.network, self.params, self.frozen, loras)
        return self._replace(params=found[0], frozen=found[1])

    def with_embedding(self, path: str | os.PathLike, token: str | None = None) -> "Pipeline":
        """Add the vectors of a new token from a file (textual inversion).

        token: what it is called in prompts; None is the name in the file, or the file's own.
        Raises ValueError for a token that exists already and a file that does not fit.
        """
        given = (self.params, self.frozen, read_embedding(path, token))
        network, params, frozen = with_embedding(self.experiment.network, *given)
        built = self.experiment.with_network(network)
        return self._replace(experiment=built, params=params, frozen=frozen)

    def __call__(
        self,
        conditions: Conditions = None,
        *,
        n: Whole | None = None,
        negative: Conditions = None,
        prompt_weights: bool | None = None,
        num_steps: Whole | None = None,
        guidance_scale: GuidanceScale | None = None,
        seed: Seed | None = 0,
        variation_seed: Seed | None = None,
        variation_strength: Number | None = None,
        batch_size: Whole | None = None,
        height: Whole | None = None,
        width: Whole | None = None,
        num_frames: Whole | None = None,
        fps: Number | None = None,
        motion_bucket_id: Number | None = None,
        cond_aug: Number | None = None,
        image: Picture | None = None,
        strength: Number | None = None,
        mask: Picture | None = None,
        resize: Resize | None = None,
        image_guidance_scale: Number | None = None,
        latents: np.ndarray | None = None,
        control_image: ControlImage = None,
        conditioning_scale: ControlScale = None,
        noise: np.ndarray | None = None,
        step_noise: np.ndarray | None = None,
        denoising_start: Number = 0.0,
        denoising_end: Number = 1.0,
        output: Literal["pixels", "latents"] = "pixels",
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Draw images, uint8 [B, H, W, C], or videos; the class says what the options are.

        Raises ValueError for bad input, naming the value and what would be right, before anything
        is compiled. Warns with NonFiniteWarning when images hold NaN or infinity.
        """
        network = self.experiment.network
        check_choice("output", output, ("pixels", "latents"))
        check_pictures(network, image, mask, strength, resize)
        seeds = check_seeds(seed, variation_seed, variation_strength)
        num_steps, total = check_num_steps(self.experiment.drawing, num_steps, guidance_scale)
        steps = steps_of_call(total, denoising_start, denoising_end, strength, latents)
        asked, size = check_sizes(self.experiment, height, width, of_image=image is not None)
        numbers = {"fps": fps, "motion_bucket_id": motion_bucket_id, "cond_aug": cond_aug}
        options: Any = dict(num_steps=num_steps, guidance_scale=guidance_scale, size=size)
        if network.num_views is not None:
            noises = {"latents": latents, "noise": noise, "step_noise": step_noise}
            others = {"n": n, "batch_size": batch_size, "negative": negative, "image": image}
            unset = others | noises | numbers | {"prompt_weights": prompt_weights}
            check_unset(unset, steps == (0, total) and output == "pixels")
            return self._draw_views(conditions, num_frames, seed=seeds.alone(), **options)
        num_frames = check_frames(network, num_frames)
        asking = (seeds.images_of(conditions, n), size, prompt_weights)
        conditions = with_control(network, conditions, control_image, conditioning_scale, size)
        arrays, count = self._conditions(conditions, negative, *asking, num_frames, numbers)
        pictures = pictures_of_call(network, image, mask, count, self._shape(asked), resize)
        arrays["inputs"] |= image_inputs(network, pictures, arrays["inputs"])
        arrays |= for_sampler(network, pictures, strength)
        shape = network.shape_of(size, num_frames)
        arrays |= as_noises(count, total, shape, latents, noise, step_noise)
        options |= {"strength": strength, "steps": steps, "num_frames": num_frames}
        options |= {"decode": output == "pixels"} | _image_scale(image_guidance_scale)
        drawn = self._draw(arrays, count, seeds, batch_size, on_step, **options)
        warn_of_non_finite(drawn)
        if output == "latents":
            return drawn
        return with_picture(network, finished(to_pixels(drawn), pictures, asked), arrays["inputs"])

    def encode(
        self, images: Picture | Sequence[Picture], *, batch_size: Whole | None = None
    ) -> np.ndarray:
        """Encode images into what the network denoises: float32 x [B, h, w, c].

        These are the modes of their latents times the scale factor, as `latents` and
        output="latents" of a call have them; of a model of pixels they are the images in [-1, 1].
        images: uint8 [B, H, W, C] or [H, W, C] or a PIL image, whose sides the first stage divides.
        Raises ValueError for other images.
        """
        self._check_images("encode is")
        return encode_images(self.experiment, self.frozen, images, batch_size)

    def decode(self, latents: np.ndarray, *, batch_size: Whole | None = None) -> np.ndarray:
        """Decode what the network denoises, float [B, h, w, c], into images uint8 [B, H, W, C].

        The inverse of encode, as far as the first stage is. Raises ValueError for another shape.
        """
        self._check_images("decode is")
        return decode_latents(self.experiment, self.frozen, latents, batch_size)

    def invert(
        self,
        images: np.ndarray,
        conditions: Conditions = None,
        *,
        negative: Conditions = None,
        prompt_weights: bool | None = None,
        num_steps: Whole | None = None,
        guidance_scale: GuidanceScale | None = None,
        denoising_start: Number = 0.0,
        iterations: Whole = 3,
        batch_size: Whole | None = None,
    ) -> np.ndarray:
        """Find the noise from which sampling draws given images: float32 x [B, h, w, c].

        `pipe(conditions, latents=x)` with the same num_steps and guidance_scale draws the images
        again; with other conditions it draws them edited. The way back reverses ddim or euler,
        see samplers.inverse: exact when iterated for ever for those two, with an error of the
        first order in the step for other samplers, and larger for a larger guidance_scale.

        images: uint8 [B, H, W, C] or [H, W, C]. conditions, negative, prompt_weights, num_steps,
            guidance_scale, batch_size: as for a call.
        denoising_start: go back only to where this share of the steps has been taken; give the
            same number to the call that draws.
        iterations: network evaluations a step.

        Raises ValueError for bad input, and for a sampler that draws noise in its steps.
        Source: Song et al. 2021 (DDIM), section 4.3.
        """
        self._check_images("invert is")
        num_steps, total = check_num_steps(self.experiment.drawing, num_steps, guidance_scale)
        check_iterations(whole_number("iterations", iterations))
        images = np.asarray(images)
        if images.ndim not in (3, 4):
            raise ValueError(f"images has shape {images.shape}; it should be [B, H, W, C]")
        images = images.reshape(-1, *images.shape[-3:])
        size = check_size(self.experiment, *images.shape[1:3])
        asking = (conditions, negative, len(images), size, prompt_weights)
        arrays, count = self._conditions(*asking)
        arrays["image"] = as_image("images", images, count, self._shape(size))
        return self._draw(
            arrays,
            count,
            Seeds(0),
            batch_size,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            steps=steps_of_shares(total, denoising_start, 1.0),
            size=size,
            invert=iterations,
        )

    def __repr__(self) -> str:
        """Show network, conditions, size of images and number of steps."""
        network, data = self.experiment.network, self.experiment.data
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        conditions = ", ".join(required_inputs(network)) or "none"
        return (
            f"Pipeline({type(network.module).__name__} with {count:,} parameters, conditions: "
            f"{conditions}, {'images' if data.num_frames is None else 'videos'} "
            f"{' x '.join(map(str, data.sample_shape))}, "
            f"{self.experiment.drawing.num_steps} steps)"
        )

    def _draw(self, arrays: Mapping[str, Any], *given: Any, **options: Any) -> np.ndarray:
        return draw_rows(self.experiment, self.params, self.frozen, arrays, *given, **options)

    def num_classes(self) -> int:
        """Tell how many classes the model knows; ValueError when they are not its condition."""
        counts = [e.num_classes for e in self.experiment.network.embedders.values()]
        if len(counts) != 1 or counts[0] is None:
            raise ValueError("this model is not conditioned on one class label alone")
        return counts[0]

    def _conditions(
        self,
        conditions: Conditions,
        negative: Conditions,
        n: Whole | None,
        size: tuple[int, int],
        weighted: bool | None,
        num_frames: int | None = None,
        numbers: Mapping[str, Number | None] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], int]:
        """Encode conditions -> (the arrays that sample_fn takes, number of images)."""
        network = self.experiment.network
        if num_frames is not None:
            network = network.with_num_frames(num_frames)
            shape = (num_frames, *self._shape(size))
            conditions = clip_conditions(network, conditions, shape, numbers)
        elif any(value is not None for value in numbers.values()):
            given = {name: value for name, value in numbers.items() if value is not None}
            raise ValueError(f"{given} does not fit: this model draws images")
        n = None if n is None else whole_number("n", n)
        asking = (network, conditions, n, self._class_names, size)
        inputs, count = encode_conditions(*asking, weighted=weighted)
        away = encode_negative(network, negative, count, weighted=weighted)
        found = dict(zip(("inputs", "negative"), alike(network, inputs, away), strict=True))
        return {name: value for name, value in found.items() if value is not None}, count

    def _draw_views(
        self, conditions: Conditions, num_frames: Whole | None, **options: Any
    ) -> np.ndarray:
        if num_frames is not None:
            num_frames = whole_number("num_frames", num_frames)
        options |= {"num_frames": num_frames}
        drawn = draw_views(self.experiment, self.params, self.frozen, conditions, **options)
        warn_of_non_finite(drawn)
        return to_pixels(drawn)

    def _check_images(self, what: str) -> None:
        if self.experiment.network.num_frames is not None:
            raise ValueError(f"{what} for models of images, and this one draws videos")

    def _shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return (*size, self.experiment.data.image_shape[-1])

    def _class_names(self) -> tuple[str, ...]:
        if self.class_names is not None:  # the folder may hold others by now
            return self.class_names
        return self.experiment.data.class_names(self.experiment.data.source("train"))


def with_files(
    pipe: Pipeline,
    loras: Mapping[str | os.PathLike, float],
    embeddings: Sequence[tuple[str | os.PathLike, str | None]],
) -> Pipeline:
    """Add LoRA files and files of new tokens, as Pipeline.with_lora and with_embedding do."""
    pipe = pipe.with_lora(loras) if loras else pipe
    for path, token in embeddings:
        pipe = pipe.with_embedding(path, token)
    return pipe


def _image_scale(image_guidance_scale: Number | None) -> dict[str, float]:
    name = "image_guidance_scale"
    return {} if image_guidance_scale is None else {name: number(name, image_guidance_scale)}
