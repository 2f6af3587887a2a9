"""The data of the race: one file of images and labels that both sides read."""

import gzip
from pathlib import Path

import numpy as np

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Arrays:
    """A source of records for a config: the images and labels of a file, whatever the split."""

    def __init__(self, split, *, path):
        with np.load(path) as held:
            self.images, self.labels = held["images"], held["labels"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": int(self.labels[index])}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The training split of the packaged MNIST subset: uint8 [4500, 28, 28, 1] and labels."""
    from diffusion_jax.data.sources.mnist_subset import read_table, split_digits

    images, labels = read_table("mnist_subset")
    chosen = split_digits(labels)["train"]
    return images[chosen][..., None], labels[chosen]


def fashion() -> tuple[np.ndarray, np.ndarray]:
    """The training split of Fashion-MNIST, of Debian's package: uint8 [60000, 28, 28, 1], labels.

    Raises FileNotFoundError when the package is not installed.
    """
    found = []
    for name, header in (("train-images-idx3-ubyte", 16), ("train-labels-idx1-ubyte", 8)):
        path = next(filter(Path.is_file, (FASHION / name, FASHION / f"{name}.gz")), None)
        if path is None:
            raise FileNotFoundError(
                f"{FASHION / name} does not exist: apt-get install dataset-fashion-mnist"
            )
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        found.append(np.frombuffer(content, np.uint8, offset=header))
    images, labels = found
    return images.reshape(len(labels), 28, 28, 1), labels


DATA = {"digits": digits, "fashion": fashion}
