"""Folders of videos as people have them: what is wrong is told, what is odd is survived."""

import os
import shutil
from pathlib import Path

import numpy as np
from faults.frame import BadInput, Fault, bad_inputs, faults
from PIL import Image
from support.videos import grey_frames, write_sound, write_video

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.open_source import open_source

SOURCE = {"num_frames": 4, "fps": 10.0, "max_corrupt": 0}


def video(count=8, size=(16, 24), fps=10, **options):
    return lambda path: write_video(path, grey_frames(range(count), size), fps, **options)


def text(words):
    return lambda path: path.write_text(words)


def cut(path):
    video(codec="libx264")(path)
    path.write_bytes(path.read_bytes()[:-200])


def frames(*sizes):
    def make(folder):
        folder.mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(folder / f"{number}.png")

    return make


def opened(place, files, clip=2, **options):
    """Write {name: what makes it} into a folder and make clips of it."""
    for name, make in files.items():
        path = Path(os.fsdecode(os.fsencode(place / "videos") + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    given = {"folder": place / "videos", "data_dir": place / "tfds", **SOURCE, **options}
    source = open_source("video_folder", "train", **given)
    return source, make_batches(source, batch_size=1, image_size=8, num_frames=clip)


def wrong(name, says, files, **options):
    def act(folder):
        next(opened(folder, files, **options)[1].iterate(0))

    return BadInput(name, act, says)


def still(path):
    Image.new("RGB", (8, 8)).save(path)


GOOD = {"a.mkv": video()}
test_bad_videos = bad_inputs(
    [
        wrong("no videos", r"holds no videos, which end in \.mp4", {"a.doc": text("")}),
        wrong("a text", r"a\.mp4: not a readable video \(", {"a.mp4": text("no video")}),
        wrong("a playlist", "not a readable video",
              {"a.mp4": text("ffconcat version 1.0\nfile b")}),
        wrong("an empty file", "not a readable video", {"a.mp4": text("")}),
        wrong("a file cut short", "not a readable video", {"a.mp4": cut}),
        wrong("sound alone", "it has no video stream", {"a.mkv": write_sound}),
        wrong("too short", "has 3 frames at 10 per second, and a record takes num_frames = 4",
              {"a.mkv": video(3)}),
        wrong("too slow", r"has 10 frames per second, fps = 30 asks for more", GOOD, fps=30.0),
        wrong("frames of two sizes", r"frame 1 has the size \(8, 8\), the first \(9, 8\)",
              {"a": frames((9, 8), *[(8, 8)] * 4)}),
        wrong("frames without a rate", "fps = None should be the frames per second",
              {"a": frames(*[(8, 8)] * 4)}, fps=None),
        wrong("a still where videos are wanted", "holds no videos", {"a.png": still}),
        wrong("no length of a clip", "num_frames = None should be the length of a clip", GOOD,
              clip=None),
        wrong("a clip longer than a record", "num_frames = 5 with frame_stride = 1 takes 5 frames",
              GOOD, clip=5),
        wrong("no such package", "pip install no_such", GOOD, folder="package:no_such/data"),
    ]
)  # fmt: skip


def survives(name, files, count, **options):
    def act(folder):
        source, batches = opened(folder, files, **options)
        assert len(source) == count
        batch = next(batches.iterate(0))
        assert batch["image"].shape == (1, 2, 8, 8, 3) and np.isfinite(batch["image"]).all()

    return Fault(name, act)


def moved(folder):
    """The prepared records do not need the videos."""
    source, _ = opened(folder, GOOD)
    shutil.rmtree(folder / "videos")
    assert len(source[1]["video"]) == 4


PAUSES = [0.0, 0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
test_odd_videos = faults(
    [
        survives("a variable rate", {"a.mkv": video(times=PAUSES)}, 3),
        survives("a phone", {"a.mp4": video(codec="libx264", turn=90)}, 2),
        survives("odd sides", {"a.mkv": video(size=(15, 23))}, 2),
        survives("one pixel high", {"a.mkv": video(size=(1, 24))}, 2),
        survives("mixed sizes", {"a.mkv": video(), "b.mkv": video(size=(24, 16))}, 4),
        survives("a name that is no text", {b"caf\xe9.mkv": video()}, 2),
        survives("an ending in capitals", {"A.MKV": video()}, 2),
        survives("files of another kind", GOOD | {"notes.md": text("x"), ".hidden": text("x")}, 2),
        survives("stills beside videos", GOOD | {"a.png": still}, 3, images="stills"),
        survives("a bad file among good ones", GOOD | {"b.mp4": text("x")}, 2, max_corrupt=1),
        Fault("the videos are gone", moved),
    ]
)
