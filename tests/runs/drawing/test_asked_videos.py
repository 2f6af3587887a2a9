"""`sample` with a model of videos: its flags reach the pipeline, and what does not fit is told."""

import numpy as np
import pytest
from PIL import Image
from support.experiments import built, trained

from diffusion_jax.cli import main
from diffusion_jax.pipeline import Pipeline

CONFIG = "configs/moving_digits.py:tiny"


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """draw(*flags) -> (picture, options) of the pipeline, or the error."""
    calls = []

    def from_workdir(workdir, **options):
        weights = trained(CONFIG)
        return Pipeline(built(CONFIG), weights.params, weights.frozen)

    def call(self, conditions, **options):
        calls.append((conditions, {k: v for k, v in options.items() if v is not None}))
        return np.zeros((options["n"], 3, 4, 4, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "from_workdir", from_workdir)
    monkeypatch.setattr(Pipeline, "__call__", call)
    Image.new("RGBA", (6, 5), (255, 0, 0, 255)).save(tmp_path / "image.png")
    out = tmp_path / "out"

    def draw(*flags):
        flags = [flag.format(tmp_path) for flag in flags]
        code = main(["sample", "--workdir=x", f"--out={out}", *flags])
        said = capsys.readouterr()
        if code != 0:
            assert code == 2 and said.err.startswith("error: ") and not out.exists()
            return said.err
        assert "videos of 3 frames: " in said.out and (out / "00000" / "00002.png").is_file()
        return calls[-1]

    return draw


@pytest.mark.slow
def test_a_picture_and_numbers_reach_the_pipeline(draw):
    picture, options = draw("--image={}/image.png", "--num_frames=3", "--fps=11", "--cond_aug=0.1")
    assert picture["image"].size == (6, 5) and picture["image"].mode == "RGBA"
    assert options == {"n": 1, "seed": 0, "num_frames": 3, "fps": 11.0, "cond_aug": 0.1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "this model makes videos of a picture: give --image=FILE"),
        (["--image={}/none.png"], "none.png does not exist"),
        (["--image={}/image.png", "--prompt=x"], "--prompt does not fit: this model makes videos"),
        (
            ["--image={}/image.png", "--azimuths=1,2"],
            "--azimuths does not fit: this model does not read where the camera is",
        ),
        (["--image={}/image.png", "--class=3"], "--class does not fit: this model makes videos"),
    ],
)
def test_what_does_not_fit_is_one_sentence(draw, flags, message):
    assert message in draw(*flags)
