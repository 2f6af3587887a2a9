"""A user's folder of objects from several sides becomes records of times and views."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from support.videos import grey_frames, write_video

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.open_source import find_prepared, open_source
from diffusion_jax.data.views import GIVEN_VIEW


def open_folder(tmp_path, split="train", **options):
    given = {"num_frames": 3, "encoding": "png", **options}
    return open_source(
        "view_folder", split, data_dir=tmp_path / "tfds", folder=tmp_path / "objects", **given
    )


def write_frames(folder, values, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        Image.new("L", size, value).save(folder / f"{number}.png")


def write_cameras(folder, azimuths, elevations=10):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"elevations": elevations, "azimuths": azimuths})
    (folder / "cameras.json").write_text(text)


@pytest.fixture
def objects(tmp_path):
    """Two objects of two views, as folders of frames; view v of time t is 50 v + t, or 100 more."""
    for name, first in (("fox", 0), ("sub/owl", 100)):
        for view in range(2):
            write_frames(
                tmp_path / "objects" / name / f"v{view}", range(first + 50 * view, 300)[:4]
            )
    write_cameras(tmp_path / "objects", [20, 110])
    return tmp_path / "objects"


def greys(record):
    return [round(float(np.asarray(Image.open(io.BytesIO(f))).mean())) for f in record["video"]]


def name_of(record):
    return bytes(record["file_name"]).decode()


def test_records_go_time_by_time_and_have_the_cameras_of_their_frames(tmp_path, objects, caplog):
    write_cameras(objects / "sub/owl", [5, 95], [0, -30])
    with caplog.at_level("INFO"):
        source = open_folder(tmp_path)
    assert f"{objects} holds objects: train 2; views of each: 2" in caplog.text
    found = {name_of(record): record for record in source}
    assert greys(found["fox"]) == [0, 50, 1, 51, 2, 52]
    assert greys(found["sub/owl"]) == [100, 150, 101, 151, 102, 152]
    assert found["fox"]["num_views"] == 2
    assert list(found["fox"]["azimuths"]) == [20, 110] * 3
    assert list(found["sub/owl"]["elevations"]) == [0, -30] * 3
    batches = make_batches(
        source, batch_size=2, image_size=8, num_frames=2, num_views=1, frame_columns=("azimuths",)
    )
    batch = next(batches.iterate(0))
    assert batch["image"].shape == batch[GIVEN_VIEW].shape == (2, 2, 8, 8, 3)
    assert batch["azimuths"].shape == (2, 4, 1)


def test_video_files_in_splits_and_views_in_the_order_of_their_numbers(tmp_path):
    for split in ("train", "val"):
        for view in (10, 9):
            frames = grey_frames(range(10 * view, 10 * view + 4))
            write_video(tmp_path / f"objects/{split}/a/{view}.mkv", frames)
    write_cameras(tmp_path / "objects/train/a", [0, 90])
    write_cameras(tmp_path / "objects", [0, 180])
    (record,) = open_folder(tmp_path)
    assert greys(record)[:4] == [90, 100, 91, 101] and list(record["azimuths"])[:2] == [0, 90]
    (other,) = open_folder(tmp_path, "validation", hop=1, num_frames=4)
    assert name_of(other) == "val/a" and list(other["azimuths"])[:2] == [0, 180]


def test_other_cameras_are_another_data_set(tmp_path, objects):
    before = open_folder(tmp_path).dataset_info.metadata["content"]
    assert find_prepared(before, tmp_path / "tfds") is not None
    write_cameras(objects, [20, 111])
    assert open_folder(tmp_path).dataset_info.metadata["content"] != before


def test_objects_whose_views_do_not_fit_together_are_left_out(tmp_path, objects, caplog):
    write_frames(objects / "long/v0", range(2))
    write_frames(objects / "long/v1", range(3))
    write_frames(objects / "wide/v0", range(4))
    write_frames(objects / "wide/v1", range(4), size=(9, 8))
    write_frames(objects / "short/v0", range(2))
    write_frames(objects / "short/v1", range(2))
    source = open_folder(tmp_path)
    assert sorted(map(name_of, source)) == ["fox", "sub/owl"]
    for words in (
        "long: its views have different lengths: v0 ends after 2 frames, and v1 does not",
        "wide: its views have different sizes: v1 has 9 x 8 pixels, and v0 has 8 x 8",
        "short: it has 2 frames at 1 per second, and a record takes num_frames = 3",
    ):
        assert words in caplog.text
    with pytest.raises(ValueError, match="makes 3 unreadable objects .*, max_corrupt = 2 allows n"):
        open_folder(tmp_path, max_corrupt=2)


def test_cameras_that_are_missing_or_too_many_are_told_before_anything_is_read(tmp_path, objects):
    write_cameras(objects, [20, 110, 200])
    with pytest.raises(ValueError, match=r"fox \(cameras: .*json\) has 2 views and 3 cameras; giv"):
        open_folder(tmp_path)
    (objects / "cameras.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="fox has no cameras.json, and neither has a folder"
    ):
        open_folder(tmp_path)
    write_cameras(objects, [20, "east"])
    with pytest.raises(
        ValueError, match="cameras.json: azimuths has 'east' and should have finite"
    ):
        open_folder(tmp_path)
    assert not (tmp_path / "tfds/view_folder/objects").exists()
    with pytest.raises(ValueError, match="holds no views, which end in .mp4"):
        (tmp_path / "empty").mkdir()
        open_source("view_folder", "train", folder=tmp_path / "empty", num_frames=3)
