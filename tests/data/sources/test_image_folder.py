"""A user's folder becomes a data set, and is prepared again when it changes."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from support.sources import captions

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.sources.folder_scan import scan
from diffusion_jax.data.sources.open_source import class_names, open_source


def write(path, value=0, mode="L", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def open_folder(tmp_path, split="train", **options):
    return open_source(
        "image_folder", split, data_dir=tmp_path / "tfds", folder=tmp_path / "photos", **options
    )


def labels(source):
    return {
        bytes(r["file_name"]).decode(): int(r["label"])
        for r in map(source.__getitem__, range(len(source)))
    }


def test_classes_from_folders(tmp_path):
    for name, value in [("dogs/a", 10), ("cats/a", 20), ("cats/deep/b", 30)]:
        write(tmp_path / "photos" / f"{name}.png", value)
    (tmp_path / "photos/cats/notes.txt").write_text("not an image")
    (tmp_path / "photos/.hidden").mkdir()
    source = open_folder(tmp_path)
    assert class_names(source) == ("cats", "dogs")
    assert labels(source) == {"dogs/a.png": 1, "cats/a.png": 0, "cats/deep/b.png": 0}
    with pytest.raises(ValueError, match="has no captions"):
        captions(source)


def test_numbered_classes_in_order_of_numbers(tmp_path):
    for name in ("10", "9", "1"):
        write(tmp_path / "photos" / name / "a.png")
    assert class_names(open_folder(tmp_path)) == ("1", "9", "10")


def test_flat_folder_has_neither_labels_nor_captions(tmp_path):
    for i in range(3):
        write(tmp_path / "photos" / f"{i}.JPG", i)
    source = open_folder(tmp_path)
    assert class_names(source) == ()
    batch = next(make_batches(source, batch_size=3, image_size=4).iterate(0))
    assert not {"label", "caption"} & set(batch)


def test_captions_and_labels_from_metadata(tmp_path):
    for i in range(3):
        write(tmp_path / "photos" / "images" / f"{i}.png", i)
    lines = [
        {"file_name": f"images/{i}.png", "text": f"número {i}", "label": ["b", "a", "b"][i]}
        for i in range(3)
    ]
    (tmp_path / "photos/metadata.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8"
    )
    source = open_folder(tmp_path)
    assert sorted(captions(source)) == ["número 0", "número 1", "número 2"]
    assert len(captions(source, 2)) == 2
    batch = next(make_batches(source, batch_size=3, image_size=4, channels=1).iterate(0))
    for image, label, caption in zip(batch["image"], batch["label"], batch["caption"], strict=True):
        i = round((image.mean() + 1) * 127.5)
        assert caption == f"número {i}"
        assert label == [1, 0, 1][i]


def test_splits_from_folders(tmp_path):
    for split, n in (("train", 4), ("val", 2), ("test", 1)):
        for i in range(n):
            write(tmp_path / "photos" / split / "x" / f"{i}.png", i)
    for split, n in (("train", 4), ("validation", 2), ("test", 1), ("train[:50%]", 2)):
        source = open_folder(tmp_path, split)
        assert len(source) == n
        assert class_names(source) == ("x",)


def test_a_class_called_test_is_a_class(tmp_path):
    for name in ("test", "other"):
        write(tmp_path / "photos" / name / "a.png")
    assert class_names(open_folder(tmp_path)) == ("other", "test")


def test_every_pixel_layout_and_size_arrives(tmp_path):
    folder = tmp_path / "photos"
    write(folder / "gray.png", 200)
    write(folder / "rgba.png", (0, 0, 0, 0), "RGBA")
    write(folder / "palette.gif", 3, "P")
    write(folder / "bits.png", 1, "1")
    write(folder / "one.png", 7, size=(1, 1))
    write(folder / "deep.png", 65535, "I;16")
    write(folder / "wide.jpg", 90, size=(40, 3))
    source = open_folder(tmp_path)
    (batch,) = eval_batches(source, batch_size=7, image_size=8).iterate(0)
    assert batch["weight"].sum() == 7
    values = {
        bytes(source[int(i)]["file_name"]).decode(): round(float(image.mean() + 1) * 127.5)
        for i, image in zip(batch["index"], batch["image"], strict=True)
    }
    assert values["rgba.png"] == values["bits.png"] == values["deep.png"] == 255
    assert values["gray.png"] == 200
    assert values["one.png"] == 7


def test_bytes_are_kept(tmp_path):
    write(tmp_path / "photos/a.jpg", (1, 2, 3), "RGB")
    assert bytes(open_folder(tmp_path)[0]["image"]) == (tmp_path / "photos/a.jpg").read_bytes()


def test_changed_folder_is_prepared_again_and_unchanged_is_not(tmp_path):
    write(tmp_path / "photos/a.png", 1)
    first = open_folder(tmp_path).dataset_info.data_dir
    assert open_folder(tmp_path).dataset_info.data_dir == first
    write(tmp_path / "photos/b.png", 2)
    second = open_folder(tmp_path)
    assert len(second) == 2
    write(tmp_path / "photos/b.png", 3)
    os.utime(tmp_path / "photos/b.png", ns=(1, 1))  # same size, other time
    third = open_folder(tmp_path)
    paths = (first, second.dataset_info.data_dir, third.dataset_info.data_dir)
    assert len({os.fspath(path) for path in paths}) == 3
    pixels = {np.asarray(Image.open(io.BytesIO(bytes(third[i]["image"]))))[0, 0] for i in (0, 1)}
    assert pixels == {1, 3}


def test_corrupt_images_are_left_out_and_named(tmp_path):
    write(tmp_path / "photos/good.png", 1)
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    (tmp_path / "photos/empty.png").write_bytes(b"")
    for _ in range(2):  # prepared now, and found prepared
        source = open_folder(tmp_path)
        assert len(source) == 1
        assert sorted(source.dataset_info.metadata["skipped"]) == ["bad.png", "empty.png"]
    with pytest.raises(ValueError, match=r"empty.png: not a readable image.*max_corrupt = 1"):
        open_folder(tmp_path, max_corrupt=1)


def test_nothing_readable(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="holds 1 image, and none can be read"):
        open_folder(tmp_path)


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder = '.*photos' is no folder"):
        open_folder(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos holds no images, which end in \.png"):
        open_folder(tmp_path)
    assert not (tmp_path / "tfds").exists()


def test_folder_is_required(tmp_path):
    with pytest.raises(ValueError, match="'folder'"):
        open_source("image_folder", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "error", "sentence"),
    [
        ("{", ValueError, "metadata.jsonl:2 is not JSON"),
        ("[]", ValueError, 'metadata.jsonl:2 should be an object with "file_name"'),
        ('{"caption": "x"}', ValueError, 'metadata.jsonl:2 should be an object with "file_name"'),
        ('{"file_name": "z.png"}', FileNotFoundError, "metadata.jsonl:2 names 'z.png'"),
        ('{"file_name": "b.png"}', ValueError, "b.png has no caption, but other images"),
    ],
)
def test_bad_metadata(tmp_path, line, error, sentence):
    write(tmp_path / "photos/a.png")
    write(tmp_path / "photos/b.png")
    good = '{"file_name": "a.png", "caption": "x"}'
    (tmp_path / "photos/metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(error, match=sentence):
        open_folder(tmp_path)


def test_images_beside_class_folders(tmp_path):
    write(tmp_path / "photos/cats/a.png")
    write(tmp_path / "photos/b.png")
    with pytest.raises(ValueError, match=r"such as b.png, beside folders"):
        scan(tmp_path / "photos")


def captioned(tmp_path, texts):
    for name, text in texts.items():
        write(tmp_path / "photos" / f"{name}.png", 1)
        if text is not None:
            (tmp_path / "photos" / f"{name}.txt").write_text(text, encoding="utf-8")


def test_captions_from_text_files(tmp_path):
    captioned(tmp_path, {"a": "a red fox\n", "0001/b": "\ufeffein Füchslein", "0002/c": ""})
    source = open_folder(tmp_path, caption="txt")
    assert sorted(captions(source)) == ["", "a red fox", "ein Füchslein"]
    assert class_names(source) == ()  # sub-folders are no classes then
    with pytest.raises(ValueError, match=r"such as a.png, beside folders"):
        open_folder(tmp_path)


def test_several_captions_per_image(tmp_path):
    captioned(tmp_path, {"a": "a fox\n\n  a red animal \n", "b": "a tree", "c": ""})
    source = open_folder(tmp_path, caption="txt")
    choices = [{"a fox", "a red animal"}, {"a tree"}, {""}]
    batches = make_batches(source, batch_size=3, image_size=4).iterate(0)
    seen = [frozenset(next(batches)["caption"]) for _ in range(20)]
    assert set(seen) == {frozenset({text, "a tree", ""}) for text in choices[0]}


def test_several_captions_from_metadata(tmp_path):
    for name in "ab":
        write(tmp_path / "photos" / f"{name}.png", 1)
    (tmp_path / "photos/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": ["x", "y"]}\n{"file_name": "b.png", "text": "z"}\n'
    )
    source = open_folder(tmp_path, caption="metadata")
    found = sorted(tuple(text.decode() for text in source[i]["caption"]) for i in (0, 1))
    assert found == [("x", "y"), ("z",)]


def test_caption_none_ignores_the_files(tmp_path):
    captioned(tmp_path, {"cats/a": "a cat", "dogs/b": "a dog"})
    (tmp_path / "photos/metadata.jsonl").write_text('{"file_name": "cats/a.png", "caption": "x"}')
    assert captions(open_folder(tmp_path)) == ["x"]
    source = open_folder(tmp_path, caption="none")
    assert class_names(source) == ("cats", "dogs")
    with pytest.raises(ValueError, match="has no captions"):
        captions(source)


def test_changed_caption_prepares_again(tmp_path):
    captioned(tmp_path, {"a": "a fox"})
    assert captions(open_folder(tmp_path, caption="txt")) == ["a fox"]
    captioned(tmp_path, {"a": "a wolf"})
    assert captions(open_folder(tmp_path, caption="txt")) == ["a wolf"]


def test_missing_and_bad_captions(tmp_path):
    captioned(tmp_path, {"a": "x", "b": None, "c": None})
    with pytest.raises(FileNotFoundError, match=r"beside each image .* 2 of 3 .* such as .*b\.txt"):
        open_folder(tmp_path, caption="txt")
    with pytest.raises(FileNotFoundError, match=r"caption = 'metadata' needs the file .*jsonl"):
        open_folder(tmp_path, caption="metadata")
    with pytest.raises(ValueError, match="caption = 'text' is unknown; choose from auto, none"):
        open_folder(tmp_path, caption="text")
    metadata = tmp_path / "photos/metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "label": "x"}')
    with pytest.raises(ValueError, match='gives a.png no "caption" and no "text"'):
        open_folder(tmp_path, caption="metadata")
    metadata.write_text('{"file_name": "a.png", "caption": {"en": "x"}}')
    with pytest.raises(
        ValueError, match=r"jsonl:1: a caption should be a text .* not \{'en': 'x'\}"
    ):
        open_folder(tmp_path, caption="metadata")
    for name in "abc":
        (tmp_path / f"photos/{name}.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        open_folder(tmp_path, caption="txt")


def test_bad_images_in_buckets(tmp_path):
    """Every layout, one pixel, a strip and a damaged header go through buckets as well."""
    folder = tmp_path / "photos"
    write(folder / "gray.png", 200)
    write(folder / "rgba.png", (0, 0, 0, 0), "RGBA", size=(8, 4))
    write(folder / "one.png", 7, size=(1, 1))
    write(folder / "deep.png", 65535, "I;16", size=(4, 9))
    write(folder / "strip.jpg", 90, size=(40, 1))
    (folder / "bad.png").write_bytes(b"no image")
    source = open_folder(tmp_path)
    changes = {"image_size": 8, "buckets": True, "bucket_divisor": 4, "max_aspect": 4.0}
    batches = eval_batches(source, batch_size=2, **changes)
    found = {
        bytes(source[int(i)]["file_name"]).decode(): (image.shape, tuple(size))
        for batch in batches.iterate(0)
        for i, image, size in zip(
            batch["index"], batch["image"], batch["original_size"], strict=True
        )
        if i >= 0
    }
    assert found == {
        "gray.png": ((8, 8, 3), (4, 5)),
        "rgba.png": ((4, 16, 3), (4, 8)),
        "one.png": ((8, 8, 3), (1, 1)),
        "deep.png": ((16, 4, 3), (9, 4)),
        "strip.jpg": ((4, 16, 3), (1, 40)),
    }
    assert len(make_batches(source, batch_size=5, **changes).shapes) == 1


def test_pairs_of_an_edit(tmp_path):
    """Each line names the image after an edit, the one before it, and the instruction."""
    photos, lines = tmp_path / "photos", []
    photos.mkdir()
    for number in range(3):
        for name in ("before", "after"):
            Image.new("RGB", (8, 8), (number, 0, 255 * (name == "after"))).save(
                photos / f"{name}{number}.png"
            )
        pair = {"file_name": f"after{number}.png", "original_image": f"before{number}.png"}
        lines.append(json.dumps(pair | {"caption": "make it blue"}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    source = open_folder(tmp_path)
    options = dict(image_size=8, num_threads=0, image_columns=("original_image",))
    batch = next(make_batches(source, batch_size=3, **options).iterate(0))
    assert np.all(batch["image"][..., 2] == 1.0) and np.all(batch["original_image"][..., 2] == -1.0)
    np.testing.assert_array_equal(batch["image"][..., 0], batch["original_image"][..., 0])
    lines[1] = json.dumps({"file_name": "after1.png", "caption": "make it blue"})
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"after1\.png has the images \[\], but .* give each the sa"
    ):
        open_folder(tmp_path)
    lines[1] = json.dumps({"file_name": "after1.png", "original_image": "lost.png"})
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        FileNotFoundError, match=r"metadata\.jsonl:2 names 'lost\.png', which is no"
    ):
        open_folder(tmp_path)


def test_numbers_of_a_table_become_features(tmp_path):
    for name in "abc":
        write(tmp_path / "photos" / f"{name}.png")
    table = "file_name,repeats,weight\na.png,3,\nb.png,,0.5\nc.png,1,2\n"
    (tmp_path / "photos/metadata.csv").write_text(table)
    source = open_folder(tmp_path)
    found = {r["file_name"]: (r["repeats"], r["weight"]) for r in source}
    assert found == {b"a.png": (3, 1.0), b"b.png": (1, 0.5), b"c.png": (1, 2.0)}
    options = dict(image_size=4, repeats_key="repeats", weight_key="weight")
    batch = next(make_batches(source, batch_size=5, **options).iterate(0))
    assert sorted(batch["loss_weight"].tolist()) == [0.5, 1.0, 1.0, 1.0, 2.0]
    # Another number is another data set.
    (tmp_path / "photos/metadata.csv").write_text(table.replace("0.5", "0.25"))
    assert min(r["weight"] for r in open_folder(tmp_path)) == 0.25


def test_repeats_in_the_names_of_folders(tmp_path):
    for name in ("10_fox/a", "2_fox/b", "cat/c"):
        write(tmp_path / "photos" / f"{name}.png")
    source = open_folder(tmp_path, folder_repeats=True)
    assert class_names(source) == ("cat", "fox")
    found = {bytes(r["file_name"]).decode(): (r["repeats"], r["label"]) for r in source}
    assert found == {"10_fox/a.png": (10, 1), "2_fox/b.png": (2, 1), "cat/c.png": (1, 0)}
    plain = open_folder(tmp_path)
    assert class_names(plain) == ("10_fox", "2_fox", "cat") and "repeats" not in plain[0]


def test_folders_with_repeats_beside_captions_and_splits(tmp_path):
    for name in ("train/10_fox/a", "train/1_cat/b", "val/c"):
        write(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(name)
    source = open_folder(tmp_path, folder_repeats=True, caption="txt")
    found = {bytes(r["caption"]).decode(): r["repeats"] for r in source}
    assert found == {"train/10_fox/a": 10, "train/1_cat/b": 1} and "label" not in source[0]
    (seen,) = open_folder(tmp_path, "validation", folder_repeats=True, caption="txt")
    assert seen["repeats"] == 1
    write(tmp_path / "photos/train/0_dog/d.png")
    (tmp_path / "photos/train/0_dog/d.txt").write_text("none")
    with pytest.raises(ValueError, match="0_dog: repeats = '0' should be a whole number between "):
        open_folder(tmp_path, folder_repeats=True, caption="txt")
