"""TFDS builder: blocks with a colour on every side, seen by cameras whose places are known.

A block stands on white; its sides are red, green, blue and yellow, going around, so that one
picture tells what the hidden ones look like. A small dark cube glides in a circle on its top. Rays
are cast through every pixel, in NumPy alone. So what any camera sees at any time follows from one
view, and a model that draws other views can be right or wrong.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from diffusion_jax.data.records import VIEWS
from diffusion_jax.data.sources.cameras import AZIMUTHS, ELEVATIONS
from diffusion_jax.data.sources.stored_frames import png
from diffusion_jax.data.sources.video_folder import camera_feature

SPLITS = {"train": 1.0, "validation": 0.05, "test": 0.05}
# Colours of the faces -x, +x, -y, +y, -z, +z, where z points up.
FACES = np.array(
    [[40, 70, 220], [220, 40, 40], [235, 205, 40], [40, 170, 70], [90, 90, 90], [190, 190, 190]],
    np.float64,
)
_DARK = np.full((6, 3), 30.0) + np.arange(6)[:, None] * 4.0
_WHITE = 255.0
# Of the camera from the middle, and half of what it sees there, in the units of the block.
_DISTANCE, _REACH = 4.0, 1.1
# Rays through each pixel along a side.
_RAYS = 2


class Box(NamedTuple):
    """A box along the axes: its lowest and highest corner [3], and the colours of its faces."""

    low: np.ndarray
    high: np.ndarray
    colours: np.ndarray


@dataclasses.dataclass(kw_only=True)
class ColouredBlocksConfig(tfds.core.BuilderConfig):
    """What the clips look like, and how many there are."""

    size: int
    num_frames: int
    num_views: int | None
    num_examples: int


class ColouredBlocks(tfds.core.GeneratorBasedBuilder):
    """Clips of one block each. "elevations" and "azimuths" are of the camera of each frame.

    Use `builder` to make one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> ColouredBlocksConfig:
        assert isinstance(self.builder_config, ColouredBlocksConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        frame = tfds.features.Tensor(shape=(), dtype=np.object_)
        features: dict[str, Any] = {
            "video": tfds.features.Sequence(frame),
            ELEVATIONS: camera_feature(),
            AZIMUTHS: camera_feature(),
        }
        if self._options.num_views is not None:
            features[VIEWS] = tfds.features.Scalar(np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Blocks with a colour on every side, seen by known cameras.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        counts = {name: max(1, round(config.num_examples * own)) for name, own in SPLITS.items()}
        return {
            split: _examples(number, count, config)
            for number, (split, count) in enumerate(counts.items())
        }

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def builder(
    data_dir: str | os.PathLike[str],
    *,
    size: int = 32,
    num_frames: int = 8,
    num_views: int | None = None,
    num_examples: int = 500,
) -> ColouredBlocks:
    """Make the builder of clips of coloured blocks, always the same ones.

    Args:
        data_dir: where TFDS data sets are prepared.
        size: pixels of each side of a frame.
        num_frames: frames of a record, or times of one with several views.
        num_views: None for one camera, which goes once around a block that stands still, in uneven
            steps and up and down; else so many cameras that stand evenly around a block with a
            moving cube.
        num_examples: clips of the split train; validation and test have a twentieth of it each, at
            least one.

    Raises:
        ValueError: a number that is too small.
    """
    least = {
        "size": (size, 8),
        "num_frames": (num_frames, 1),
        "num_views": (num_views or 2, 2),
        "num_examples": (num_examples, 1),
    }
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} = {value} should be at least {low}")
    views = "orbit" if num_views is None else f"{num_views}_views"
    config = ColouredBlocksConfig(
        name=f"{size}px-{num_frames}_frames-{views}-{num_examples}_examples",
        size=size,
        num_frames=num_frames,
        num_views=num_views,
        num_examples=num_examples,
    )
    return ColouredBlocks(data_dir=data_dir, config=config)


def seen(boxes: list[Box], elevation: float, azimuth: float, size: int) -> np.ndarray:
    """Draw boxes as a camera sees them that looks at the middle: uint8 [size size 3].

    The camera is at an elevation above the horizon and at an azimuth from the x axis, both in
    degrees; the azimuth grows towards the y axis, and z points up.
    """
    above, around = np.deg2rad([elevation, azimuth])
    towards = np.array(
        [np.cos(above) * np.cos(around), np.cos(above) * np.sin(around), np.sin(above)]
    )
    right = np.array([-np.sin(around), np.cos(around), 0.0])
    up = np.cross(towards, right)
    places = ((np.arange(size * _RAYS) + 0.5) / (size * _RAYS) * 2.0 - 1.0) * _REACH
    through = places[None, :, None] * right - places[:, None, None] * up
    colours = _traced(boxes, towards * _DISTANCE, through - towards * _DISTANCE)
    pixels = colours.reshape(size, _RAYS, size, _RAYS, 3).mean((1, 3))
    return np.rint(pixels).astype(np.uint8)


def _traced(boxes: list[Box], origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Find the colour that each ray [h w 3] from the origin meets first, white where none is."""
    colours = np.full(rays.shape, _WHITE)
    nearest = np.full(rays.shape[:2], np.inf)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / rays
    for box in boxes:
        ends = np.stack([(box.low - origin) * inverse, (box.high - origin) * inverse])
        enters, leaves = ends.min(0), ends.max(0)
        axis, first = enters.argmax(-1), enters.max(-1)
        hits = (first <= leaves.min(-1)) & (0.0 < first) & (first < nearest)
        # A ray that goes down an axis enters through the upper face of that axis.
        downwards = np.take_along_axis(rays, axis[..., None], -1)[..., 0] < 0.0
        colours[hits] = box.colours[2 * axis + downwards][hits]
        nearest[hits] = first[hits]
    return colours


def _examples(
    split: int, count: int, config: ColouredBlocksConfig
) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in range(count):
        # A generator of each clip: how many there are does not change them.
        rng = np.random.Generator(np.random.Philox(key=split, counter=[0, 0, 0, i]))
        half = rng.uniform([0.4, 0.4, 0.25], [0.6, 0.6, 0.45])
        phase, turn = rng.uniform(0, 360), rng.choice([-1, 1]) * rng.uniform(10, 30)
        first, level, swing = rng.uniform(0, 360), rng.uniform(0, 30), rng.uniform(0, 10)
        times, frames = config.num_frames, []
        if config.num_views is None:
            # Uneven steps, or a model could do without the angles.
            share = (np.arange(times) + rng.uniform(-0.4, 0.4, times)) / times
            azimuths, times_shown = first + 360.0 * share, np.zeros(times)
            elevations = level + swing * np.sin(2 * np.pi * share)
            views = {}
        else:
            around = first + 360.0 * np.arange(config.num_views) / config.num_views
            azimuths, times_shown = np.tile(around, times), np.repeat(range(times), len(around))
            elevations = np.full(azimuths.shape, level)
            views = {VIEWS: config.num_views}
        azimuths = azimuths % 360.0
        for time, elevation, azimuth in zip(times_shown, elevations, azimuths, strict=True):
            boxes = blocks(half, phase + time * turn)
            frames.append(png(seen(boxes, elevation, azimuth, config.size)))
        angles = {ELEVATIONS: elevations, AZIMUTHS: azimuths}
        angles = {name: own.astype(np.float32) for name, own in angles.items()}
        yield i, {"video": frames, **angles, **views}


def blocks(half: np.ndarray, degrees: float) -> list[Box]:
    """Make the block with these half sides [3], and the cube on it so far along its circle."""
    angle = np.deg2rad(degrees)
    middle = np.array([np.cos(angle), np.sin(angle), 0.0]) * 0.3 + [0.0, 0.0, half[2] + 0.12]
    return [Box(-half, half, FACES), Box(middle - 0.12, middle + 0.12, _DARK)]
