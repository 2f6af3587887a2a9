"""Captioned emoji as a TFDS data set."""

import io

import numpy as np
import pytest
from PIL import Image
from support.sources import captions

from diffusion_jax.data.records import find_features
from diffusion_jax.data.sources import openmoji
from diffusion_jax.data.sources.open_source import open_source
from diffusion_jax.data.sources.packages import require_packages


@pytest.fixture(scope="module")
def drawings():
    for package in openmoji._PACKAGES:
        pytest.importorskip(package)
    folder = require_packages("openmoji", openmoji._PACKAGES)[0] / "openmoji" / "svg"
    return openmoji.find_drawings(folder, skin_tones=True)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("🦊", "fox"),
        ("🇰🇪", "flag of Kenya"),
        ("❤", "red heart"),
        ("#\ufe0f\u20e3", "keycap #"),
        ("👋🏽", "waving hand, medium skin tone"),
        ("👨🏻\u200d🦰", "man, light skin tone, red hair"),
        ("👞", "man's shoe"),
        ("-", None),
        ("\ue000", None),
        ("🇰", None),
    ],
)
def test_captions_read_like_words(drawings, text, caption):
    assert openmoji.caption_of(tuple(map(ord, text))) == caption


def test_thousands_of_different_captions(drawings):
    names = [drawing.caption for drawing in drawings]
    assert len(names) > 3500
    assert len(set(names)) == len(names)
    assert not [name for name in names if ":" in name or "_" in name]


def without_tones(caption):
    return " ".join(part for part in caption.split(", ") if not part.endswith(" skin tone"))


def test_variants_of_one_emoji_stay_in_one_split(drawings):
    splits = openmoji.split_by_base(drawings)
    bases = {split: {without_tones(d.caption) for d in part} for split, part in splits.items()}
    assert not bases["train"] & (bases["validation"] | bases["test"])
    assert not bases["validation"] & bases["test"]
    assert sum(map(len, splits.values())) == len(drawings)
    toned = [d for d in splits["test"] if "skin tone" in d.caption]
    assert toned


def test_split_does_not_depend_on_other_emoji(drawings):
    test = {d.caption for d in openmoji.split_by_base(drawings)["test"]}
    fewer = {d.caption for d in openmoji.split_by_base(drawings[::2])["train"]}
    assert len(fewer & test) < 0.1 * len(test)


def test_prepare_a_few(drawings, tmp_path):
    options = {"size": 24, "skin_tones": False, "max_examples": 12}
    total = 0
    for split in ("train", "validation", "test"):
        source = open_source("openmoji", split, data_dir=tmp_path, **options)
        total += len(source)
        assert all(captions(source))
        for i in range(len(source)):
            image = np.asarray(Image.open(io.BytesIO(bytes(source[i]["image"]))))
            assert image.shape == (24, 24, 3)
            assert image[0, 0].tolist() == [255, 255, 255]
            assert image.std() > 1
    assert total == 12
    assert find_features(source).caption == "caption"
    assert "CC BY-SA 4.0" in source.dataset_info.citation


def test_background(drawings, tmp_path):
    options = {"size": 8, "skin_tones": False, "max_examples": 3, "background": "#102030"}
    source = open_source("openmoji", "train", data_dir=tmp_path, **options)
    image = np.asarray(Image.open(io.BytesIO(bytes(source[0]["image"]))))
    assert image[0, 0].tolist() == [0x10, 0x20, 0x30]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size = 0 should be"),
        ({"background": "url(x)"}, "background = 'url"),
        (
            {"background": "nocolour", "size": 8, "max_examples": 3},
            "background = .nocolour. .* cannot be",
        ),
        ({"max_examples": 2}, "max_examples = 2 should be at least 3"),
        ({"colour": "red"}, r"options \['colour'\] do not fit the data set 'openmoji'"),
    ],
)
def test_bad_options(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_source("openmoji", "train", data_dir=tmp_path, **options)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(openmoji, "_PACKAGES", {"no_such_pkg": "no-such-pkg"})
    with pytest.raises(ModuleNotFoundError, match=r"needs no-such-pkg: pip install no-such-pkg"):
        open_source("openmoji", "train", data_dir=tmp_path)


def test_emoji_come_with_their_originals_in_grey(tmp_path):
    options = dict(data_dir=tmp_path, size=16, max_examples=3)
    source = open_source("openmoji", "train", **options, originals=True)
    grey, image = (
        np.asarray(Image.open(io.BytesIO(bytes(source[0][name]))))
        for name in ("original_image", "image")
    )
    luma = np.asarray(Image.fromarray(image).convert("L"))
    assert image.std() > 1
    np.testing.assert_array_equal(grey, np.repeat(luma[..., None], 3, -1))
    assert find_features(source).image == "image"
