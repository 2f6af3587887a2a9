"""What `sample` was asked for -> what a Pipeline is called with, and who writes what it draws."""

import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.cameras import ORBIT_POLARS
from diffusion_jax.runs.drawing.recipe import find_recipe
from diffusion_jax.runs.drawing.samples import write_clips, write_samples
from diffusion_jax.runs.drawing.views import NUM_FRAMES, ORBIT, VIDEO, prepared_video, used_frames
from diffusion_jax.runs.folder import has_run
from diffusion_jax.runs.inputs.arrays import read_image, read_mask, read_picture
from diffusion_jax.runs.inputs.clips import read_clip
from diffusion_jax.runs.inputs.conditions import (
    FRAME_NAME,
    Conditions,
    check_count,
    required_inputs,
)
from diffusion_jax.runs.inputs.control import read_control
from diffusion_jax.runs.inputs.frames import frame_rate
from diffusion_jax.runs.inputs.seeds import Seed, check_seeds, read_seeds
from diffusion_jax.wording import counted

DEFAULT_COUNT = 16
# Flags that only one kind of model has.
_FOR_VIDEOS = ("elevation", "azimuths", "orbit")
_FOR_IMAGES = (
    *("label", "prompt", "negative_prompt", "strength", "mask", "control_image"),
    *("resize", "image_guidance_scale", "prompt_weights"),
)
_VARIATION = ("variation_seed", "variation_strength")
# Options of a call that have the names of their flags.
_SHARED = (
    *("guidance_scale", "seed", *_VARIATION, "batch_size", "height", "width"),
    *("num_frames", "fps", "motion_bucket_id", "cond_aug"),
)
_OF_IMAGES = ("strength", "resize", "image_guidance_scale", "prompt_weights")
# Of the videos that the scripts of SV4D write, where the given one does not say it.
_FPS = 10.0
# Files with weights of SV3D, which draw the orbit.
_WEIGHTS = (".safetensors", ".ckpt")


class Asked(NamedTuple):
    """The flags of `sample` that say what to draw; None for one that was not given."""

    label: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    prompt_weights: bool | None = None
    n: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: Seed | str = 0
    variation_seed: Seed | str | None = None
    variation_strength: float | None = None
    batch_size: int | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    control_image: str | None = None
    resize: str | None = None
    image_guidance_scale: float | None = None
    strength: float | None = None
    num_frames: int | None = None
    fps: float | None = None
    motion_bucket_id: float | None = None
    cond_aug: float | None = None
    elevation: float | None = None
    azimuths: str | None = None
    orbit: str | None = None


@runtime_checkable
class Model(Protocol):
    """What has to be known of a Pipeline."""

    @property
    def experiment(self) -> Experiment:
        """The experiment whose networks draw."""
        ...

    def num_classes(self) -> int:
        """Tell how many classes the model knows."""
        ...


class Call(NamedTuple):
    """What a Pipeline is called with. write(drawn) writes it to files, and says so in words."""

    conditions: Conditions
    options: dict[str, Any]
    write: Callable[[np.ndarray], str]


def make_call(
    model: Model,
    asked: Asked,
    folder: pathlib.Path,
    *,
    name: str,
    load: Callable[[pathlib.Path], Any],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Call:
    """Read the files that flags name, and turn the flags into a call.

    folder: where the samples go. name: of the model, for the images' files, as is `more`, further
    facts by name. load: makes a Pipeline of a run or a file with weights, for --orbit.
    Raises ValueError for a flag that does not fit the model, or that is missing.
    """
    network, asked = model.experiment.network, _with_seeds(asked)
    if network.num_frames is None:
        _refuse(asked, _FOR_VIDEOS, "this model draws images")
        return _images(model, asked, folder, name, more)
    _refuse(asked, _FOR_IMAGES, "this model makes videos of a picture")
    if network.num_views is not None:
        _refuse(asked, _VARIATION, "this model draws views of a video")
        return _views(model, asked, folder, load)
    _refuse(asked, ("orbit",), "this model draws one view")
    return _videos(model, asked, folder)


def _refuse(asked: Asked, flags: tuple[str, ...], why: str) -> None:
    for flag in flags:
        if getattr(asked, flag) is not None:
            raise ValueError(f"--{'class' if flag == 'label' else flag} does not fit: {why}")


def _with_seeds(asked: Asked) -> Asked:
    """Read the numbers in the flags of seeds."""
    other = asked.variation_seed
    return asked._replace(
        seed=read_seeds(asked.seed, "--seed"),
        variation_seed=None if other is None else read_seeds(other, "--variation_seed"),
    )


def _options(asked: Asked, **more: Any) -> dict[str, Any]:
    return {"num_steps": asked.steps, **{name: getattr(asked, name) for name in _SHARED}, **more}


def _images(
    model: Model, asked: Asked, folder: pathlib.Path, name: str, more: Mapping[str, Any]
) -> Call:
    count = _count(asked)
    conditions, n = _image_conditions(model, asked, count)
    shared = {name: getattr(asked, name) for name in _OF_IMAGES}
    options = _options(asked, n=n, negative=asked.negative_prompt, **shared)
    if asked.image is not None:
        channels = model.experiment.data.image_shape[-1]
        options["image"] = read_image(asked.image, channels, flag="--image=")
    if asked.mask is not None:
        options["mask"] = read_mask(asked.mask, flag="--mask=")
    if asked.control_image is not None:
        found = read_control(asked.control_image, flag="--control_image=")
        options["control_image"], options["conditioning_scale"] = found

    def write(images: np.ndarray) -> str:
        recipe = find_recipe(
            model.experiment,
            conditions,
            images.shape[1:3],
            model=name,
            negative=asked.negative_prompt,
            num_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            seeds=check_seeds(asked.seed, asked.variation_seed, asked.variation_strength),
            options=options,
            more={**_files(asked), **more},
        )
        grid = write_samples(folder, images, recipe)
        return (
            f"wrote {counted(len(images), 'image', 'images')} to {folder} and their grid to {grid}"
        )

    return Call(conditions, options, write)


def _files(asked: Asked) -> dict[str, str]:
    """Name the pictures that flags gave, without their folders."""
    given = {
        "Init image": asked.image,
        "Mask": asked.mask,
        "ControlNet image": asked.control_image,
    }
    return {key: text.rpartition("/")[2] for key, text in given.items() if text is not None}


def _count(asked: Asked, default: int = DEFAULT_COUNT) -> int:
    """Count the images of each condition: as many as there are seeds, unless --n says it."""
    if asked.n is not None:
        return check_count(asked.n)
    several = [s for s in (asked.seed, asked.variation_seed) if isinstance(s, list)]
    labels = 1 if asked.label is None else len(asked.label.split(","))
    return max(1, len(several[0]) // labels) if several else default


def _image_conditions(model: Model, asked: Asked, count: int) -> tuple[Conditions, int | None]:
    label, prompt = asked.label, asked.prompt
    if label is not None and prompt is not None:
        raise ValueError(f"give --class={label} or --prompt={prompt!r}, not both")
    if not model.experiment.network.embedders:
        if label is not None or prompt is not None:
            given = f"--class={label}" if label is not None else f"--prompt={prompt!r}"
            raise ValueError(f"{given} does not fit: this model is unconditional")
        return None, count
    if "caption" in required_inputs(model.experiment.network):
        if prompt is None:
            raise ValueError('this model reads text: give --prompt="..."')
        return prompt, count
    if prompt is not None:
        raise ValueError(f"--prompt={prompt!r} does not fit: this model reads no text")
    if label is None:
        # Every class in turn, so that a first look shows them all.
        classes = model.num_classes()
        return [i % classes for i in range(count)], None
    return [part for part in label.split(",") for _ in range(count)], None


def _videos(model: Model, asked: Asked, folder: pathlib.Path) -> Call:
    network = model.experiment.network
    known = required_inputs(network)
    conditions: dict[str, Any] = {}
    if FRAME_NAME in known:
        if asked.image is None:
            raise ValueError("this model makes videos of a picture: give --image=FILE")
        conditions[FRAME_NAME] = read_picture(asked.image, flag="--image=")
    if ORBIT_POLARS not in known:
        why = "this model does not read where the camera is"
        _refuse(asked, ("elevation", "azimuths"), why)
    conditions |= _angles(asked)

    def write(clips: np.ndarray) -> str:
        written = ", ".join(map(str, write_clips(folder, clips, frame_rate(network, asked.fps))))
        return (
            f"wrote {counted(len(clips), 'video', 'videos')} of {clips.shape[1]} frames: {written}"
        )

    return Call(conditions or None, _options(asked, n=_count(asked, default=1)), write)


def _views(
    model: Model, asked: Asked, folder: pathlib.Path, load: Callable[[pathlib.Path], Any]
) -> Call:
    network, angles = model.experiment.network, _angles(asked)
    takes_orbit = network.first_views == "orbit"
    if asked.image is None:
        raise ValueError("this model draws views of a video: give it as --image=FILE")
    _refuse(asked, ("n",), "this model draws one clip for each view")
    if takes_orbit and asked.orbit is None:
        raise ValueError("this model needs --orbit=FILE: SV3D's weights, or a video that it drew")
    if not takes_orbit:
        _refuse(asked, ("orbit",), "this model draws the first views by itself")
    clip = read_clip(asked.image, used_frames(network, asked.num_frames), flag="--image=")
    default = model.experiment.data.image_shape[:2]
    size = (asked.height or default[0], asked.width or default[1])
    try:
        video = prepared_video(network, clip.frames, size)
    except ValueError as error:
        raise ValueError(f"--image={asked.image} does not fit: {error}") from error
    conditions = {VIDEO: clip.frames, **angles}
    if takes_orbit:
        conditions[ORBIT] = _orbit(asked, video[0], load)

    def write(clips: np.ndarray) -> str:
        written = ", ".join(map(str, write_clips(folder, clips, clip.fps or _FPS)))
        return f"wrote {counted(len(clips), 'view', 'views')} of {clips.shape[1]} frames: {written}"

    return Call(conditions, _options(asked), write)


def _orbit(asked: Asked, first: np.ndarray, load: Callable[[pathlib.Path], Any]) -> Any:
    """Read the orbit around the first frame, or draw it with SV3D's weights."""
    assert asked.orbit is not None
    path = pathlib.Path(asked.orbit)
    if path.suffix not in _WEIGHTS and not has_run(path):
        frames = read_clip(path, NUM_FRAMES + 1, flag="--orbit=").frames
        if len(frames) != NUM_FRAMES:
            found = counted(len(frames), "frame", "frames") if len(frames) < NUM_FRAMES else "more"
            raise ValueError(f"--orbit={path} should have {NUM_FRAMES} frames; it has {found}")
        return frames
    sv3d = load(path)
    takes_angles = ORBIT_POLARS in required_inputs(sv3d.experiment.network)
    given = {FRAME_NAME: first, **(_angles(asked) if takes_angles else {})}
    return sv3d(given, num_frames=NUM_FRAMES, num_steps=asked.steps, seed=asked.seed)[0]


def _angles(asked: Asked) -> dict[str, Any]:
    angles: dict[str, Any] = {}
    if asked.elevation is not None:
        angles["elevations"] = asked.elevation
    if asked.azimuths is not None:
        try:
            angles["azimuths"] = [float(part) for part in asked.azimuths.split(",")]
        except ValueError as error:
            raise ValueError(
                f"--azimuths={asked.azimuths} should be numbers with commas between them"
            ) from error
    return angles
