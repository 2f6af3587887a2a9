"""The door: what is prepared is found and read, what is not fails at once and says why."""

import socket
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.sources import captions
from tensorflow_datasets.core import file_adapters

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.records import find_features
from diffusion_jax.data.sources import preparation
from diffusion_jax.data.sources.open_source import (
    _is_encoded,
    class_names,
    open_source,
)


class TinyDiffusionShapes(tfds.core.GeneratorBasedBuilder):
    """Ten one-colour images with unusual feature names, for this file."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "photo": tfds.features.Image(shape=(None, None, 3)),
                    "breed": tfds.features.ClassLabel(names=["beagle", "collie"]),
                    "id": tfds.features.Text(),
                    "sentence": tfds.features.Text(),
                    "age": tfds.features.Scalar(dtype=np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, n):
        for i in range(n):
            yield (
                i,
                {
                    "photo": Image.new("RGB", (6, 4), (i, i, i)),
                    "breed": i % 2,
                    "id": f"{i}",
                    "sentence": f"dog {i}",
                    "age": i,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyDiffusionShapes(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


NAME = "tiny_diffusion_shapes"


@pytest.mark.parametrize(
    ("split", "length"),
    [("train", 10), ("test", 4), ("train[:90%]", 9), ("train[90%:]+test", 5), ("train[2:5]", 3)],
)
def test_splits_and_their_parts(data_dir, split, length):
    assert len(open_source(NAME, split, data_dir=data_dir)) == length


@pytest.mark.parametrize("name", [NAME, f"{NAME}:1.2.0", f"{NAME}:1.*.*"])
def test_names(data_dir, name):
    assert len(open_source(name, "test", data_dir=data_dir)) == 4


def test_path_of_a_prepared_version(data_dir):
    assert len(open_source(str(data_dir / NAME / "1.2.0"), "test")) == 4


def test_directory_from_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(open_source(NAME, "test")) == 4


def test_features_with_unusual_names(data_dir):
    source = open_source(NAME, "train", data_dir=data_dir)
    assert class_names(source) == ("beagle", "collie")
    assert len(class_names(source)) == 2
    assert sorted(captions(source, caption_key="sentence")) == [f"dog {i}" for i in range(10)]
    batches = make_batches(source, batch_size=10, image_size=4, caption_key="sentence")
    batch = next(batches.iterate(0))
    shades = np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert sorted(shades) == list(range(10))
    np.testing.assert_array_equal(batch["label"], shades % 2)
    assert batch["caption"].tolist() == [f"dog {i}" for i in shades]
    aged = make_batches(source, batch_size=10, image_size=4, label_key="age")
    batch = next(aged.iterate(0))
    shades = np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
    np.testing.assert_array_equal(batch["label"], shades)
    assert "caption" not in batch
    with pytest.raises(ValueError, match="label_key = 'age ' is no feature; choose from"):
        make_batches(source, batch_size=10, image_size=4, label_key="age ")


def test_a_source_knows_its_data_set_and_its_features(data_dir):
    source = open_source(NAME, "train", data_dir=data_dir)
    info = source.dataset_info
    assert (info.full_name, info.file_format.value) == (f"{NAME}/1.2.0", "array_record")
    assert find_features(source) == ("photo", "breed", None)
    assert class_names(source) == ("beagle", "collie")
    assert class_names([{"image": np.zeros((2, 2), np.uint8)}]) == ()


def test_unknown_split(data_dir):
    with pytest.raises(ValueError, match=r"split = 'val' cannot be read .*choose from train, test"):
        open_source(NAME, "val", data_dir=data_dir)


def test_unknown_names_suggest_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no data set 'cifer10' .* did you mean cifar10"):
        open_source("cifer10", "train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a prepared TFDS data set"):
        open_source(str(tmp_path / "nothing"), "train")


def test_not_prepared_says_how_within_seconds(tmp_path):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"'cifar10' is not prepared in .*download=True"):
        open_source("cifar10", "train", data_dir=tmp_path)
    assert time.monotonic() - start < 5


def test_download_without_a_network_fails_within_seconds(tmp_path, monkeypatch):
    """A host that accepts and then says nothing: the worst case for a client with retries."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(preparation, "_CONNECT_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/data.tar.gz"
        monkeypatch.setattr(TinyDiffusionShapes, "url_infos", {url: None})
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"127\.0\.0\.1.* does not answer"):
            open_source(NAME, "train", data_dir=tmp_path, download=True)
        assert time.monotonic() - start < 5


def test_download_prepares_what_needs_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        open_source(NAME, "train", data_dir=tmp_path)
    assert len(open_source(NAME, "train", data_dir=tmp_path, download=True)) == 10
    assert len(open_source(NAME, "train", data_dir=tmp_path)) == 10


def test_download_that_needs_tensorflow_says_so(tmp_path, monkeypatch):
    def generate(self, n):
        raise ModuleNotFoundError("No module named 'tensorflow'")
        yield

    monkeypatch.setattr(TinyDiffusionShapes, "_generate_examples", generate)
    with pytest.raises(ModuleNotFoundError, match="not installed .*tensorflow.*another machine"):
        open_source(NAME, "train", data_dir=tmp_path, download=True)


def test_format_without_random_access(data_dir, monkeypatch):
    monkeypatch.setattr(
        tfds.core.DatasetInfo,
        "available_file_formats",
        lambda self: {file_adapters.FileFormat.TFRECORD},
    )
    with pytest.raises(ValueError, match=r"as tfrecord, .*tfds convert_format"):
        open_source(NAME, "train", data_dir=data_dir)


def test_only_images_of_integers_stay_encoded():
    image = tfds.features.Image
    assert _is_encoded(image())
    assert _is_encoded(image(dtype=np.uint16, encoding_format="png"))
    assert not _is_encoded(image(shape=(2, 2, 1), dtype=np.float32))
    assert not _is_encoded(tfds.features.Text())
