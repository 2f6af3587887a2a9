"""Videos that a user names: files, animated pictures and folders of frames."""

import numpy as np
import pytest
from PIL import Image
from support.videos import grey_frames, write_sound, write_video

from diffusion_jax.runs.inputs.clips import read_clip


def greys(clip):
    return [np.asarray(frame.convert("RGB"))[0, 0, 0] for frame in clip.frames]


def test_a_video_file_gives_its_first_frames_and_its_rate(tmp_path):
    path = write_video(tmp_path / "x.mkv", grey_frames([10, 60, 110]), fps=12)
    clip = read_clip(path, 2)
    assert clip.fps == 12 and greys(clip) == [10, 60]
    assert len(read_clip(path, 9).frames) == 3


def test_a_gif_keeps_its_opacity(tmp_path):
    frames = []
    for grey in (50, 90):
        frame = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
        frame.paste((grey, grey, grey, 255), (2, 2, 5, 5))
        frames.append(frame)
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, disposal=2)
    clip = read_clip(path, 5)
    assert clip.fps == 25 and len(clip.frames) == 2
    for frame, grey in zip(clip.frames, (50, 90), strict=True):
        pixels = np.asarray(frame)
        assert pixels[0, 0, 3] == 0 and pixels[3, 3].tolist() == [grey] * 3 + [255]


def test_a_folder_of_frames_is_read_in_the_order_of_numbers(tmp_path):
    for number in (10, 0, 9):
        Image.new("RGBA", (4, 4), (number * 20,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._1.png").write_bytes(b"what macOS leaves beside a file")
    clip = read_clip(tmp_path, 2)
    assert clip.fps is None and greys(clip) == [0, 180] and clip.frames[0].mode == "RGBA"


def test_a_frame_of_another_size_is_named(tmp_path):
    for number, width in enumerate((4, 4, 5)):
        Image.new("RGB", (width, 4)).save(tmp_path / f"{number}.png")
    assert len(read_clip(tmp_path, 2).frames) == 2
    said = r"--image=.*2.png has 5 x 4 pixels; it should have 4 x 4 pixels, as 0.png has"
    with pytest.raises(ValueError, match=said):
        read_clip(tmp_path, 3, flag="--image=")


def test_a_damaged_animation_is_one_sentence(tmp_path):
    frames = [Image.effect_noise((40, 40), 80) for _ in range(4)]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"--image=.*x.gif is not a readable image \(OSError"):
        read_clip(path, 4, flag="--image=")


def test_what_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty").mkdir()
    write_sound(tmp_path / "sound.wav")
    said = {
        "none.mp4": "--image=.*none.mp4 does not exist",
        "broken.mp4": "--image=.*broken.mp4 is no video: not a readable video",
        "sound.wav": "sound.wav is no video: it has no video stream",
        "empty": "empty holds no pictures",
    }
    for name, message in said.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_clip(tmp_path / name, 3, flag="--image=")
