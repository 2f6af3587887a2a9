"""`sample` with a model of several views: flags reach the pipeline, and what is wrong is told."""

import numpy as np
import pytest
from PIL import Image
from support.experiments import built
from support.videos import grey_frames, write_video

from diffusion_jax.cli import main
from diffusion_jax.pipeline import Pipeline

CONFIGS = {"sv4d": "configs/sv4d.py:tiny", "sv4d2": "configs/sv4d.py:2_tiny"}
SV3D = "configs/sv3d.py:tiny"


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """draw(model, *flags) -> what was drawn with, call by call, or the error."""
    calls = []

    def from_checkpoint(path, config=None, **options):
        name = str(path).rpartition("/")[2].removesuffix(".safetensors")
        return Pipeline(built(SV3D if name == "sv3d_u" else CONFIGS[name]), {}, {})

    def call(self, conditions, **options):
        calls.append((conditions, {k: v for k, v in options.items() if v is not None}))
        return np.zeros((2, 3, 4, 4, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "from_checkpoint", from_checkpoint)
    monkeypatch.setattr(Pipeline, "__call__", call)
    write_video(tmp_path / "video.mkv", grey_frames(range(10, 90, 10)), fps=12)
    frames = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(30, 51)]
    frames[0].save(tmp_path / "orbit.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.png")
    white = [Image.new("L", (4, 4), grey) for grey in (254, 255, 254, 255)]
    white[0].save(tmp_path / "white.gif", save_all=True, append_images=white[1:])
    out = tmp_path / "out"

    def draw(model, *flags):
        flags = [flag.format(tmp_path) for flag in flags]
        code = main(["sample", f"--checkpoint={model}.safetensors", f"--out={out}", *flags])
        said = capsys.readouterr()
        if code != 0:
            assert code == 2 and said.err.startswith("error: ") and not out.exists()
            return said.err
        assert "wrote 2 views of 3 frames: " in said.out and (out / "00001.gif").is_file()
        return calls

    return draw


def test_a_video_and_angles_reach_the_pipeline(draw):
    [(given, options)] = draw(
        "sv4d2", "--image={}/video.mkv", "--num_frames=5", "--azimuths=0,90,180", "--steps=3"
    )
    assert [np.asarray(frame)[0, 0, 0] for frame in given["video"]] == [10, 20, 30, 40, 50]
    assert given["azimuths"] == [0, 90, 180] and set(given) == {"video", "azimuths"}
    assert options == {"num_frames": 5, "num_steps": 3, "seed": 0}


def test_the_orbit_is_read_or_drawn(draw):
    [(given, _)] = draw("sv4d", "--image={}/video.mkv", "--orbit={}/orbit.gif")
    assert len(given["video"]) == 3 and len(given["orbit"]) == 21


def test_a_run_of_sv3d_draws_the_orbit(draw, tmp_path, monkeypatch):
    (tmp_path / "sv3d").mkdir()
    (tmp_path / "sv3d/config.json").write_text("{}")
    monkeypatch.setattr(Pipeline, "from_workdir", lambda path: Pipeline(built(SV3D), {}, {}))
    [(first, _), _] = draw("sv4d", "--image={}/video.mkv", "--orbit={}/sv3d")
    assert set(first) == {"image"}


def test_weights_of_sv3d_draw_the_orbit_around_the_first_frame(draw):
    [(first, options), (given, _)] = draw(
        "sv4d", "--image={}/video.mkv", "--orbit=sv3d_u.safetensors", "--elevation=20"
    )
    assert set(first) == {"image"} and first["image"].shape == (32, 32, 3)
    assert options == {"num_frames": 21, "seed": 0}
    assert given["orbit"].shape == (3, 4, 4, 3) and given["elevations"] == 20.0


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("sv4d2", [], "this model draws views of a video: give it as --image=FILE"),
        ("sv4d2", ["--image={}/video.mkv", "--n=2"], "--n does not fit: this model draws one clip"),
        ("sv4d2", ["--image={}/video.mkv", "--orbit=x"], "--orbit does not fit: this model draws"),
        ("sv4d", ["--image={}/video.mkv"], "this model needs --orbit=FILE: SV3D's weights, or a"),
        ("sv4d", ["--image=x.mp4", "--orbit=y"], "--image=x.mp4 does not exist"),
        ("sv4d", ["--image={}/video.mkv", "--orbit=y"], "--orbit=y does not exist"),
        (
            "sv4d",
            ["--image={}/video.mkv", "--orbit={}/video.mkv"],
            "should have 21 frames; it has 8",
        ),
        ("sv4d2", ["--image={}/one.png"], "one.png does not fit: the video has 1 frame; it should"),
        ("sv4d2", ["--image={}/white.gif"], "white.gif does not fit: the video is wholly white or"),
    ],
)
def test_what_does_not_fit_is_one_sentence(draw, model, flags, message):
    assert message in draw(model, *flags)
