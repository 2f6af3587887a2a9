"""Clips come back out of the files that they were written to."""

import sys

import av
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.train.videos import save_clip


def clip(frames=5, size=(32, 48), channels=3):
    """A bright square that moves over a ramp."""
    pixels = np.zeros((frames, *size, channels), np.uint8)
    pixels += np.linspace(0, 120, size[1]).astype(np.uint8)[:, None]
    for t in range(frames):
        pixels[t, 8:16, 4 * t : 4 * t + 8] = 220
    return pixels


def read_mp4(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return float(stream.average_rate), frames


@pytest.mark.parametrize(("size", "channels"), [((32, 48), 3), ((31, 47), 1)])
def test_mp4(tmp_path, size, channels):
    pixels = clip(size=size, channels=channels)
    assert save_clip(tmp_path / "a.mp4", pixels, fps=7.0) == tmp_path / "a.mp4"
    fps, frames = read_mp4(tmp_path / "a.mp4")
    assert fps == 7 and frames.shape == (5, 32, 48, 3)
    error = np.abs(frames[:, : size[0], : size[1]].astype(int) - pixels)
    assert error.mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_gif(tmp_path):
    pixels = clip()
    with Image.open(save_clip(tmp_path / "a.gif", pixels, fps=7.0)) as picture:
        assert picture.n_frames == 5 and picture.info["loop"] == 0
        durations, frames = [], []
        for t in range(5):
            picture.seek(t)
            durations.append(picture.info["duration"])
            frames.append(np.asarray(picture.convert("RGB"), int))
    assert sum(durations) == 710 and set(durations) == {140, 150}
    assert np.abs(np.stack(frames) - pixels).mean() < 4
    with Image.open(save_clip(tmp_path / "quick.gif", pixels, fps=1000.0)) as picture:
        assert picture.info["duration"] == 20


def test_contact_sheet_and_frames(tmp_path):
    pixels = clip(channels=1)
    sheet = np.asarray(Image.open(save_clip(tmp_path / "a.png", pixels, fps=7.0)))
    assert sheet.shape == (2 + 2 * 34, 2 + 3 * 50)
    np.testing.assert_array_equal(sheet[36:68, 52:100], pixels[4, ..., 0])
    folder = save_clip(tmp_path / "new" / "frames", pixels, fps=7.0)
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{i}.png" for i in range(5)]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "00003.png")), pixels[3, ..., 0])


def test_what_cannot_be_written(tmp_path, monkeypatch):
    for path, pixels, fps, words in (
        ("a.webm", clip(), 7.0, r"a.webm ends in '.webm'; choose from .mp4, .gif, .png, no ending"),
        ("a.gif", clip()[0], 7.0, r"shape \(32, 48, 3\) should be uint8 \[t, h, w, 1 or 3\]"),
        ("a.gif", clip().astype(float), 7.0, "float64 and shape"),
        ("a.gif", clip()[:0], 7.0, r"shape \(0, 32, 48, 3\)"),
        ("a.gif", clip(), 0.0, "fps = 0.0 should be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            save_clip(tmp_path / path, pixels, fps=fps)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"writing a.mp4 needs av: pip install av; .gif"):
        save_clip(tmp_path / "a.mp4", clip(), fps=7.0)
    assert not list(tmp_path.iterdir())
