"""Several processes may prepare one data set at the same time."""

import fcntl
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorflow_datasets.core.utils import tqdm_utils

from diffusion_jax.data import transforms
from diffusion_jax.data.sources import preparation
from diffusion_jax.data.sources.open_source import open_source

SCRIPT = """
import sys
from diffusion_jax.data.sources.open_source import open_source

source = open_source("image_folder", "train", data_dir=sys.argv[1], folder=sys.argv[2])
print(len(source), len({source[i]["file_name"] for i in range(len(source))}))
"""


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(200):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    return folder


def test_processes_at_the_same_time(tmp_path, photos):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "tfds"), str(photos)]
    root = Path(__file__).parents[3]
    running = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert out.decode().split() == ["200", "200"]
    assert not list((tmp_path / "tfds").rglob("incomplete.*"))


def test_coming_second_reads_what_the_first_prepared(tmp_path, photos, monkeypatch):
    """The other process finishes while this one is writing: its name is taken."""
    options = {"data_dir": tmp_path / "tfds", "folder": photos}
    decode = transforms.decode
    first_read = []

    def race(encoded, channels):
        if not first_read:
            first_read.append(encoded)
            first_read.append(len(open_source("image_folder", "train", **options)))
        return decode(encoded, channels)

    monkeypatch.setattr(transforms, "decode", race)
    assert len(open_source("image_folder", "train", **options)) == 200
    assert first_read[1] == 200
    assert not list((tmp_path / "tfds").rglob("incomplete.*"))


def test_data_directory_that_cannot_be_written(tmp_path, photos):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match=r"data_dir: .* could not be prepared in .*file"):
        open_source("image_folder", "train", data_dir=blocked, folder=photos)


def said(caplog):
    return [record.message for record in caplog.records if record.name.startswith("diffusion")]


def test_preparing_says_two_lines_and_draws_no_bars(tmp_path, photos, capfd, caplog):
    """Asked for the bars again afterwards, as TFDS's own data sets may need them."""
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            open_source("image_folder", "train", data_dir=tmp_path / "tfds", folder=photos)
    taken_for, preparing = said(caplog)
    assert taken_for == (
        f"{photos} holds images: train 200; classes: none; captions: none; ignored files: none"
    )
    assert preparing.startswith("preparing image_folder/photos-")
    out, err = capfd.readouterr()
    assert "Generating" not in out + err
    assert "\r" not in out + err
    list(tqdm_utils.tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path, photos):
    place = tmp_path / "tfds" / "image_folder"
    left = [place / "photos-0123456789ab" / "incomplete.AB12CD_1.0.0", place / "incomplete.X_1"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
    options = {"data_dir": tmp_path / "tfds", "folder": photos}
    with (place / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a process that prepares does
        open_source("image_folder", "train", **options)
        assert all((folder / "half").exists() for folder in left)
    (photos / "0.png").unlink()
    open_source("image_folder", "train", **options)
    assert not any(folder.exists() for folder in left)


def test_a_process_that_is_stopped_while_it_removes_is_not_waited_for(
    tmp_path, photos, monkeypatch
):
    place = tmp_path / "tfds" / "image_folder"
    place.mkdir(parents=True)
    monkeypatch.setattr(preparation, "_REMOVE_SECONDS", 0.2)
    with (place / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opened = open_source("image_folder", "train", data_dir=tmp_path / "tfds", folder=photos)
    assert len(opened)


def test_copies_of_earlier_versions_are_told(tmp_path, photos, caplog):
    """A file that is touched makes no new copy; one that changes does."""
    options = {"data_dir": tmp_path / "tfds", "folder": photos}
    with caplog.at_level(logging.INFO):
        open_source("image_folder", "train", **options)
        (photos / "1.png").touch()
        open_source("image_folder", "train", **options)
        (photos / "1.png").unlink()
        open_source("image_folder", "train", **options)
    first, second = [line for line in said(caplog) if line.startswith("preparing image_folder")]
    assert "other versions" not in first
    assert re.search("; 1 other versions take 0[.][0-9] MB there$", second)
