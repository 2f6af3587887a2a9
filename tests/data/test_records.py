"""Captions in every form in which data sets keep them."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.batches import eval_batches
from diffusion_jax.data.records import captions_of, find_features
from diffusion_jax.data.sources.open_source import open_source


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a fox", ("a fox",)),
        ("Füchse".encode(), ("Füchse",)),
        ([b"a", "b"], ("a", "b")),
        (np.array([b"a", b"b"], object), ("a", "b")),
        ({"text": np.array([b"a", b"b"], object), "id": np.arange(2)}, ("a", "b")),
        ([], ("",)),
        (np.array([], object), ("",)),
    ],
)
def test_forms(value, expected):
    assert captions_of(value) == expected


def test_no_caption_at_all():
    with pytest.raises(TypeError, match="a caption should be a text or a sequence of texts, not 3"):
        captions_of(3)


class TinyDiffusionCaptions(tfds.core.GeneratorBasedBuilder):
    """Three images with sequences of captions, plain and as coco_captions has them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "captions": tfds.features.Sequence(text),
                    "people": tfds.features.Sequence({"id": np.int64, "text": text}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            texts = [f"{i}{c}" for c in "abc"][: 3 - i]
            people = [{"id": 7, "text": f"person {i}"}] * i
            image = Image.new("RGB", (2, 2), (i, i, i))
            yield i, {"image": image, "captions": texts, "people": people}


def test_sequences_of_tfds(tmp_path):
    TinyDiffusionCaptions(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    source = open_source("tiny_diffusion_captions", "train", data_dir=tmp_path)
    assert find_features(source).caption == "captions"
    assert sorted(
        captions_of(record["captions"]) for record in map(source.__getitem__, range(3))
    ) == [
        ("0a", "0b", "0c"),
        ("1a", "1b"),
        ("2a",),
    ]
    batches = eval_batches(source, batch_size=3, image_size=2, caption_key="people")
    (batch,) = batches.iterate(0)
    assert sorted(batch["caption"]) == ["", "person 1", "person 2"]
