"""webdataset's shards: what stands together is one sample, and what is bad is counted."""

import io
import json
import re
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.sources import captions

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.open_source import class_names, open_source
from diffusion_jax.data.sources.tar_folder import read_tar


def picture(value):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, mode: Any = "w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def open_tars(tmp_path, split="train", **options) -> Any:
    return open_source(
        "tar_folder", split, data_dir=tmp_path / "tfds", folder=tmp_path / "shards", **options
    )


def records(source):
    """The red of each image -> its record."""
    found = {}
    for record in map(source.__getitem__, range(len(source))):
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
        found[int(pixels[0, 0, 0])] = record
    return found


def test_samples_with_classes_and_captions_from_every_kind_of_file(tmp_path):
    say = lambda **fields: json.dumps(fields).encode()
    write_tar(tmp_path / "shards/train-0000.tar", [
        ("a/0001.png", picture(1)), ("a/0001.txt", b"a red fox\n"), ("a/0001.cls", b"9"),
        ("a/0002.json", say(caption="two", label=10)), ("a/0002.PNG", picture(2)),
        ("a/0002.seg.png", b"no image of its own"), ("a/readme", b"of nothing"),
    ])  # fmt: skip
    more = [("b.png", picture(3)), ("b.json", say(text="three", label="9", url="x"))]
    write_tar(tmp_path / "shards/train-0001.tar.gz", more, "w:gz")
    write_tar(tmp_path / "shards/val-0000.tar", [*more, ("c.png", picture(4))])
    source = open_tars(tmp_path)
    assert class_names(source) == ("9", "10") and len(source) == 3
    found = records(source)
    words = {red: (bytes(r["caption"]).decode(), int(r["label"])) for red, r in found.items()}
    assert words == {1: ("a red fox", 0), 2: ("two", 1), 3: ("three", 0)}
    assert bytes(found[1]["file_name"]).decode() == "train-0000.tar/a/0001"
    validation = open_tars(tmp_path, "validation")
    assert len(validation) == 1  # c has neither class nor caption, and is left out
    assert [*validation.dataset_info.metadata["skipped"]] == ["val-0000.tar/c"]


def test_batch_k_is_the_same_whenever_it_is_asked_for(tmp_path):
    members = [(f"{i}.png", picture(i)) for i in range(10)]
    write_tar(tmp_path / "shards/0.tar", members[:6])
    write_tar(tmp_path / "shards/1.tar", members[6:])
    batches = make_batches(open_tars(tmp_path), batch_size=4, image_size=4, seed=3)
    first = [batch["image"] for batch, _ in zip(batches.iterate(0), range(6), strict=False)]
    np.testing.assert_array_equal(next(batches.iterate(5))["image"], first[5])
    again = make_batches(open_tars(tmp_path), batch_size=4, image_size=4, seed=3)
    np.testing.assert_array_equal(next(again.iterate(2))["image"], first[2])
    with pytest.raises(ValueError, match="has no captions"):
        captions(open_tars(tmp_path))


def test_bad_samples_are_counted_like_bad_files(tmp_path):
    good = [(f"g{i}.png", picture(i)) for i in range(3)]
    bad = [("x.txt", b"alone"), ("y.png", b"no image"), ("z.png", picture(9)), ("z.json", b"{")]
    write_tar(tmp_path / "shards/0.tar", [*good, *bad])
    source = open_tars(tmp_path, max_corrupt=3)
    assert len(source) == 3 and len(source.dataset_info.metadata["skipped"]) == 3
    with pytest.raises(ValueError, match=r"makes 3 unreadable images .*max_corrupt = 2 allows no"):
        open_tars(tmp_path, max_corrupt=2)


def test_what_is_wrong_with_a_sample_is_told_by_its_name(tmp_path, caplog):
    shard = tmp_path / "shards/0.tar"
    bad = [
        ("photo.1.png", picture(1)),
        ("x.txt", b"alone"),
        ("y.png", picture(2)),
        ("y.txt", b"\xff"),
    ]
    bad += [
        ("z.png", picture(3)),
        ("z.json", b"{"),
        ("e.png", b""),
        ("e.txt", b"a text"),
        ("g.mask.png", picture(4)),
    ]
    write_tar(shard, [*bad, ("g.png", picture(4)), ("g.txt", b"a text")])
    (source,) = records(open_tars(tmp_path)).values()
    assert bytes(source["file_name"]) == b"0.tar/g"
    for name, told in (
        ("photo", r"no image, only \.1\.png \(a name ends at its first dot\)"),
        ("x", r"no image, only \.txt"),
        ("y", r"its \.txt is not UTF-8 text"),
        ("z", r"its \.json is not JSON"),
        ("e", "not a readable image"),
    ):
        assert re.search(f"skipped {re.escape(str(shard))}/{name}: {told}", caplog.text), name


def test_shards_without_images_are_refused(tmp_path):
    write_tar(tmp_path / "shards/0.tar", [("x.txt", b"alone")])
    with pytest.raises(ValueError, match="holds 1 shard without images"):
        open_tars(tmp_path)


def test_a_shard_that_is_no_tar_file_or_cut_off_is_told(tmp_path):
    path = tmp_path / "shards/0.tar"
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_tars(tmp_path)
    path.parent.mkdir()
    with pytest.raises(ValueError, match="holds no shards, which end in .tar, .tar.gz, .tgz"):
        open_tars(tmp_path)
    path.write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match="0.tar is cut off or no tar file: [^\n]*[a-z]$"):
        open_tars(tmp_path)
    whole = write_tar(tmp_path / "whole.tar", [("a.png", picture(1) * 50)]).read_bytes()
    path.write_bytes(whole[:1500])
    with pytest.raises(ValueError, match="0.tar is cut off or no tar file"):
        list(read_tar(path, True))


def test_a_shard_that_changed_is_prepared_again(tmp_path):
    path = tmp_path / "shards/0.tar"
    write_tar(path, [("a.png", picture(1))])
    before = open_tars(tmp_path)
    write_tar(path, [("a.png", picture(2))])
    assert [*records(before)] == [1] and [*records(open_tars(tmp_path))] == [2]


def test_numbers_of_a_json_count(tmp_path):
    say = lambda **fields: json.dumps(fields).encode()
    write_tar(tmp_path / "shards/a.tar", [
        ("1.png", picture(1)), ("1.json", say(repeats=4, weight=0.5)),
        ("2.png", picture(2)), ("3.png", picture(3)), ("3.json", say(repeats=0)),
    ])  # fmt: skip
    found = records(open_tars(tmp_path, max_corrupt=1))
    assert {red: (r["repeats"], r["weight"]) for red, r in found.items()} == {
        1: (4, 0.5),
        2: (1, 1.0),
    }
    (sample,) = (s for s in read_tar(tmp_path / "shards/a.tar", False) if s.problem)
    assert sample.problem == "its .json: repeats = 0 should be a whole number between 1 and 1000000"
