"""A user's folder of videos becomes records of encoded frames, and clips come out of them."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from support.sources import captions
from support.videos import grey_frames, write_sound, write_video

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.fingerprint import data_differences, data_fingerprint
from diffusion_jax.data.sources.folder_scan import IMAGES, SUFFIXES, VIDEO_SUFFIXES, Kind, scan
from diffusion_jax.data.sources.open_source import class_names, find_prepared, open_source
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.data import build_data


def open_folder(tmp_path, split="train", **options):
    given = {"num_frames": 4, "encoding": "png", **options}
    return open_source(
        "video_folder", split, data_dir=tmp_path / "tfds", folder=tmp_path / "videos", **given
    )


def records(source):
    """(file name, start) -> the grey values of the frames of a record."""
    return {
        (bytes(r["file_name"]).decode(), round(float(r["start"]), 3)): [
            round(float(np.asarray(Image.open(io.BytesIO(frame))).mean())) for frame in r["video"]
        ]
        for r in map(source.__getitem__, range(len(source)))
    }


def test_videos_are_cut_into_records(tmp_path):
    write_video(tmp_path / "videos/cats/a.mkv", grey_frames(range(11)), 10)
    write_video(tmp_path / "videos/dogs/b.avi", grey_frames(range(100, 105)), 5)
    source = open_folder(tmp_path)
    assert class_names(source) == ("cats", "dogs")
    assert records(source) == {
        ("cats/a.mkv", 0.0): [0, 1, 2, 3],
        ("cats/a.mkv", 0.4): [4, 5, 6, 7],
        ("cats/a.mkv", 0.7): [7, 8, 9, 10],  # the end is more than half a hop
        ("dogs/b.avi", 0.0): [100, 101, 102, 103],
    }
    assert sorted(round(float(source[i]["fps"]), 3) for i in range(4)) == [5, 10, 10, 10]
    assert set(records(open_folder(tmp_path, hop=2, fps=5.0))) == {
        ("cats/a.mkv", 0.0), ("cats/a.mkv", 0.4), ("dogs/b.avi", 0.0), ("dogs/b.avi", 0.2),
    }  # fmt: skip
    batch = next(
        make_batches(source, batch_size=4, image_size=8, num_frames=2, frame_stride=2).iterate(0)
    )
    assert batch["image"].shape == (4, 2, 8, 8, 3)
    for index, label, fps_id in zip(batch["index"], batch["label"], batch["fps_id"], strict=True):
        assert fps_id[0] == (10, 5)[label] / 2 - 1
        assert source[int(index)]["label"] == label


def test_folders_of_frames_are_videos(tmp_path):
    for number in range(12):
        path = tmp_path / "videos/run" / f"f{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number,) * 3).save(path)
    (tmp_path / "videos/run.txt").write_text("a run")
    with pytest.raises(ValueError, match=r"fps = None should be the frames .* such as .*/run"):
        open_folder(tmp_path)
    source = open_folder(tmp_path, fps=8.0)
    assert records(source) == {
        ("run", 0.0): [0, 1, 2, 3], ("run", 0.5): [4, 5, 6, 7], ("run", 1.0): [8, 9, 10, 11],
    }  # fmt: skip
    assert captions(source) == ["a run"] * 3
    assert float(source[0]["fps"]) == 8


def test_captions_from_metadata_for_videos_and_folders(tmp_path):
    write_video(tmp_path / "videos/a.mkv", grey_frames(range(4)))
    for number in range(4):
        path = tmp_path / "videos/b" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), number).save(path)
    lines = [{"file_name": "a.mkv", "caption": "one"}, {"file_name": "b", "text": "two"}]
    (tmp_path / "videos/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sorted(captions(open_folder(tmp_path, fps=10.0))) == ["one", "two"]


def test_stills_train_jointly(tmp_path):
    write_video(tmp_path / "videos/a.mkv", grey_frames(range(4)))
    Image.new("RGB", (9, 7), (99, 99, 99)).save(tmp_path / "videos/b.png")
    assert list(records(open_folder(tmp_path))) == [("a.mkv", 0.0)]
    source = open_folder(tmp_path, images="stills")
    assert records(source)["b.png", 0.0] == [99]
    batch = next(make_batches(source, batch_size=2, image_size=6, num_frames=3).iterate(0))
    names = [bytes(source[int(i)]["file_name"]).decode() for i in batch["index"]]
    for name, indicator in zip(names, batch["image_only_indicator"], strict=True):
        assert (indicator == (name == "b.png")).all()


def test_bad_videos_are_left_out_and_named(tmp_path, caplog):
    write_video(tmp_path / "videos/good.mkv", grey_frames(range(4)))
    write_video(tmp_path / "videos/short.mkv", grey_frames(range(3)))
    write_sound(tmp_path / "videos/sound.mkv")
    (tmp_path / "videos/text.mp4").write_text("no video")
    for number, size in enumerate([(8, 6), (8, 6), (6, 8), (8, 6)]):
        path = tmp_path / "videos/mixed" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", size, number).save(path)
    for _ in range(2):  # prepared now, and found prepared
        source = open_folder(tmp_path, fps=10.0)
        assert list(records(source)) == [("good.mkv", 0.0)]
        skipped = sorted(source.dataset_info.metadata["skipped"])
        assert skipped == ["mixed", "short.mkv", "sound.mkv", "text.mp4"]
    for words in (
        "short.mkv: it has 3 frames at 10 per second, and a record takes num_frames = 4",
        "sound.mkv: it has no video stream",
        "text.mp4: not a readable video (",
        "mixed: frame 2 has the size (6, 8), the first (8, 6)",
    ):
        assert words in caplog.text
    with pytest.raises(ValueError, match=r"makes 4 unreadable videos.*max_corrupt = 3 allows no"):
        open_folder(tmp_path, fps=10.0, max_corrupt=3)
    (tmp_path / "videos/good.mkv").unlink()
    with pytest.raises(
        ValueError, match="holds 4 videos, and none can be used; the last one, .*: "
    ):
        open_folder(tmp_path, fps=10.0)


def test_what_comes_before_the_damage_is_kept(tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(20)]
    path = write_video(tmp_path / "videos/torn.mkv", noise, 10)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + rng.bytes(2000) + whole[middle + 2000 :])
    source = open_folder(tmp_path)
    assert [start for _, start in sorted(records(source))] == [0.0, 0.4]
    assert "torn.mkv: not a readable video (Invalid data found" in caplog.text


def test_mixed_sizes_go_into_buckets(tmp_path):
    for name, size in (("a", (16, 24)), ("b", (24, 16)), ("c", (32, 48)), ("d", (48, 32))):
        write_video(tmp_path / f"videos/{name}.mkv", grey_frames(range(4), size))
    source = open_folder(tmp_path, short_side=16)
    sizes = {Image.open(io.BytesIO(source[i]["video"][0])).size for i in range(4)}
    assert sizes == {(24, 16), (16, 24)}
    batches = make_batches(
        source, batch_size=2, image_size=32, num_frames=2, buckets=True, bucket_divisor=8
    )
    assert batches.shapes == ((24, 40), (40, 24))
    shapes = {next(batches.iterate(step))["image"].shape for step in range(4)}
    assert shapes == {(2, 2, 24, 40, 3), (2, 2, 40, 24, 3)}


def test_what_decides_about_records_is_part_of_the_fingerprint(tmp_path):
    write_video(tmp_path / "videos/a.mkv", grey_frames(range(8)))
    first = open_folder(tmp_path)
    saved = data_fingerprint(first)
    assert data_differences(saved, data_fingerprint(open_folder(tmp_path, max_corrupt=3))) == []
    for change in ({"hop": 3}, {"fps": 5.0}, {"encoding": "jpeg"}, {"num_frames": 3}):
        assert data_differences(saved, data_fingerprint(open_folder(tmp_path, **change)))
    found = find_prepared(saved["digest"], tmp_path / "tfds")
    assert found is not None
    np.testing.assert_equal(records(open_source(found, "train")), records(first))


def test_options_out_of_range(tmp_path):
    for options, words in (
        ({"num_frames": 0}, "num_frames = 0 should be at least 1"),
        ({"hop": 0}, "hop = 0 should be at least 1"),
        ({"fps": 0.0}, "fps = 0.0 should be above 0"),
        ({"encoding": "webp"}, "encoding = 'webp' is unknown; choose from jpeg, png"),
        ({"images": "all"}, "images = 'all' is unknown; choose from frames, stills"),
    ):
        with pytest.raises(ValueError, match=words):
            open_folder(tmp_path, **options)


def test_batches_of_videos_need_the_length_of_a_clip(tmp_path):
    write_video(tmp_path / "videos/a.mkv", grey_frames(range(4)))
    with pytest.raises(ValueError, match="num_frames = None should be the length of a clip: 'vide"):
        make_batches(open_folder(tmp_path), batch_size=1, image_size=8)


def test_what_a_folder_is_taken_for(tmp_path):
    for name in ("a/x.mp4", "b/y.mov", "b/notes.md", "c/1.png", "c/2.png", "loose.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    kind = Kind("video", "videos", VIDEO_SUFFIXES, frames=True)
    with pytest.raises(ValueError, match=r"holds videos, such as c, beside folders of videos; put"):
        scan(tmp_path, kind=kind)
    (tmp_path / "c").rename(tmp_path / "b" / "c")
    assert scan(tmp_path, kind=kind).in_words() == (
        "videos: train 3; classes: 2 (a, b); captions: none; ignored files: 1 .md, 1 .png"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        ValueError, match=r"holds no videos, which end in \.mp4.*nor a folder of im"
    ):
        scan(empty, kind=kind)
    assert IMAGES.suffixes == SUFFIXES


@pytest.mark.slow
def test_real_videos_of_a_package_become_clips(tmp_path):
    section = load_config("configs/moving_digits.py:videos", []).data.to_dict()
    section["source"]["data_dir"] = str(tmp_path)
    data = build_data(section)
    records = data.source("train")
    buckets: dict[str, list[float]] = {}
    batches = data.train_batches(records, batch_size=8, seed=0).iterate(0)
    for batch in itertools.islice(batches, 4):
        assert batch["image"].shape == (8, 8, 32, 32, 3) and (batch["fps_id"] == 11.5).all()
        for index, bucket in zip(batch["index"], batch["motion_bucket_id"][:, 0], strict=True):
            name = bytes(records[int(index)]["file_name"]).decode().partition("_")[0]
            buckets.setdefault(name, []).append(bucket)
    # The camera of the first follows cyclists, in the second somebody talks in a car.
    assert np.mean(buckets["bikes.mp4"]) > np.mean(buckets["carphone"]) + 50
    assert len(data.source("validation")) + len(records) == 18


def write_angles(tmp_path, *lines):
    rows = (
        dict(zip(("file_name", "elevations", "azimuths"), line, strict=False)) for line in lines
    )
    (tmp_path / "videos/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_frames_have_the_angles_of_their_cameras(tmp_path, caplog):
    """A file and a folder of frames, which needs no rate here; the second record begins later."""
    write_video(tmp_path / "videos/a.mkv", grey_frames(range(6)), 10)
    (tmp_path / "videos/b").mkdir()
    for number in range(4):
        Image.new("L", (24, 16), 100 + number).save(tmp_path / f"videos/b/{number}.png")
    write_angles(tmp_path, ("a.mkv", 7, [*range(6)]), ("b", [1, 2, 3, 4], [50, 40, 30, 20]))
    with caplog.at_level("INFO"):
        source = open_folder(tmp_path, cameras=True)
    assert "videos: train 2; classes: none; captions: none; each with its cameras;" in caplog.text
    shown = {
        round(float(np.asarray(Image.open(io.BytesIO(r["video"][0]))).mean())): r for r in source
    }
    assert sorted(shown) == [0, 2, 100]
    assert list(shown[2]["azimuths"]) == [2, 3, 4, 5] and list(shown[2]["elevations"]) == [7] * 4
    assert list(shown[100]["azimuths"]) == [50, 40, 30, 20]
    columns = {"frame_columns": ("elevations", "azimuths")}
    batch = next(
        make_batches(source, batch_size=3, image_size=8, num_frames=2, **columns).iterate(0)
    )
    values = np.rint((batch["image"].mean((2, 3, 4)) + 1) * 127.5)
    for value, azimuth in zip(values, batch["azimuths"][..., 0], strict=True):
        np.testing.assert_array_equal(azimuth, value if value[0] < 100 else 1050 - 10 * value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("a.mkv", 0, [0, 1, 2]), ("b.mkv", 0, [0, 1, 2, 3])], "a.mkv has 4 frames and 3 cameras"),
        (
            [("a.mkv", 0, [0, 1, 2, 3]), ("b.mkv",)],
            "b.mkv has no list of elevations and azimuths, ",
        ),
        ([("a.mkv",), ("b.mkv",)], "videos says of no video where its cameras are; give each one "),
        ([("a.mkv", "up", [0])], r"metadata.jsonl:1: elevations has 'up' and should have finite d"),
        ([("a.mkv", float("nan"), [0])], r"metadata.jsonl:1 is not JSON \(NaN is no number of JSO"),
    ],
)
def test_cameras_that_do_not_fit_are_told_before_anything_is_prepared(tmp_path, lines, message):
    for name in ("a", "b"):
        write_video(tmp_path / f"videos/{name}.mkv", grey_frames(range(4)), 10)
    write_angles(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, cameras=True)
    assert not list((tmp_path / "tfds").glob("video_folder/*/*"))
