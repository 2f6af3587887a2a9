"""A fingerprint tells another content from the same content in another place."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources.fingerprint import data_differences, data_fingerprint
from diffusion_jax.data.sources.open_source import open_source


def fill(folder, names, value=0):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value + number).save(folder / name)
    return folder


def of_folder(folder, data_dir, split="train", **options):
    source = open_source("image_folder", split, data_dir=data_dir, folder=folder, **options)
    return data_fingerprint(source)


NAMES = ["train/cat/0.png", "train/dog/0.png", "train/dog/1.png", "val/cat/2.png"]


def test_a_folder_that_moved_is_the_same_and_json_keeps_it(tmp_path):
    first = of_folder(fill(tmp_path / "photos", NAMES), tmp_path / "tfds")
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    second = of_folder(tmp_path / "elsewhere", tmp_path / "tfds2")
    assert data_differences(json.loads(json.dumps(first)), second) == []
    assert first["class_names"] == ["cat", "dog"]
    assert (first["num_examples"], first["split_sizes"]) == (3, {"train": 3, "validation": 1})


def test_what_changes_in_a_folder_is_named(tmp_path):
    before = of_folder(fill(tmp_path / "photos", NAMES), tmp_path / "tfds")
    fill(tmp_path / "photos", ["train/ant/0.png"])
    (tmp_path / "photos/train/dog/1.png").rename(tmp_path / "photos/val/cat/3.png")
    assert data_differences(before, of_folder(tmp_path / "photos", tmp_path / "tfds")) == [
        "class_names: 3 (was 2), with new ant; "
        "with other numbers: cat from 0 to 1, dog from 1 to 2",
        "split_sizes = {'train': 3, 'validation': 2} was {'train': 3, 'validation': 1}",
    ]


def test_other_pixels_and_exchanged_images_are_noticed(tmp_path):
    before = of_folder(fill(tmp_path / "a/photos", NAMES), tmp_path / "tfds")
    pixels = of_folder(fill(tmp_path / "b/photos", NAMES, value=9), tmp_path / "tfds")
    exchanged = fill(tmp_path / "c/photos", NAMES)
    train, val, spare = (exchanged / name for name in (NAMES[0], NAMES[3], "x"))
    for old, new in ((train, spare), (val, train), (spare, val)):
        old.rename(new)
    for found in (pixels, of_folder(exchanged, tmp_path / "tfds")):
        assert data_differences(before, found) == [
            "other images, labels or captions (the digest of their content differs)"
        ]


def png(value, level):
    buffer = io.BytesIO()
    Image.new("L", (64, 64), value).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def records(level=9, **changes):
    found = [{"image": png(i, level), "label": i % 2, "text": f"number {i}"} for i in range(100)]
    found[0].update(changes)
    return found


def test_sources_without_files_are_compared_by_their_records():
    first = data_fingerprint(records())
    assert first == data_fingerprint(records(level=0))  # another encoder, the same pixels
    for change in ({"label": 1}, {"text": "other"}, {"image": png(7, 9)}):
        (line,) = data_differences(first, data_fingerprint(records(**change)))
        assert line.startswith("other images, labels or captions")
    assert data_differences(first, data_fingerprint(records()[:99])) == [
        "num_examples = 99 was 100"
    ]


def test_records_that_are_drawn_anew_have_no_digest():
    class Drawn:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": np.random.default_rng().integers(0, 256, (8, 8), dtype=np.uint8)}

    found = data_fingerprint(Drawn())
    assert found["digest"] is None
    assert data_differences(found, data_fingerprint(Drawn())) == []


@pytest.mark.parametrize("count", [5, 1000])
def test_many_classes_are_told_in_short(count):
    names = [f"c{i}" for i in range(count)]
    found = {"class_names": names, "num_examples": 1, "digest": "a"}
    (line,) = data_differences(found | {"class_names": []}, found)
    assert line == f"class_names: {count} (was 0), with new c0, c1, c2, ..."
