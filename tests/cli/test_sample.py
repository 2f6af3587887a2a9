"""`sample` on the command line: what is drawn for which flags, before anything is drawn."""

import warnings

import numpy as np
import pytest
from PIL import Image
from support.experiments import built, trained

from diffusion_jax.cli import main
from diffusion_jax.cli.sample import draw
from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.pipeline import NonFiniteWarning, Pipeline
from diffusion_jax.runs.drawing.asked import Call

CONFIGS = {"classes": "mnist", "text": "emoji_ldm", "video": "moving_digits"}


@pytest.fixture
def drawn(monkeypatch, tmp_path, capsys):
    """draw(kind of model, *flags) -> (conditions, options) of the pipeline, or the error."""
    calls = []

    def from_workdir(workdir, *, step, ema, overrides):
        path = f"configs/{CONFIGS[workdir]}.py:tiny"
        weights = trained(path)
        calls.append({"step": step, "ema": ema, "overrides": overrides})
        return Pipeline(built(path), weights.params, weights.frozen)

    def call(self, conditions, **options):
        calls.append((conditions, {k: v for k, v in options.items() if v is not None}))
        return np.zeros((3, 4, 4, 1), np.uint8)

    monkeypatch.setattr(Pipeline, "from_workdir", from_workdir)
    monkeypatch.setattr(Pipeline, "__call__", call)
    out = tmp_path / "out"

    def draw(kind, *flags):
        code = main(["sample", f"--workdir={kind}", f"--out={out}", *flags])
        said = capsys.readouterr()
        if code == 0:
            assert f"wrote 3 images to {out}" in said.out and len([*out.iterdir()]) == 4
            return calls
        assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
        assert not out.exists()
        return said.err

    return draw


@pytest.mark.parametrize(
    ("kind", "flags", "conditions", "n"),
    [
        ("classes", ["--n=12"], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], None),
        ("classes", ["--class=7", "--n=2"], ["7", "7"], None),
        ("classes", ["--class=1,3", "--n=2"], ["1", "1", "3", "3"], None),
        ("text", ["--prompt=a fox"], "a fox", 16),
        ("text", ["--prompt=a fox", "--n=3"], "a fox", 3),
    ],
)
def test_conditions_are_those_of_the_flags(drawn, kind, flags, conditions, n):
    _, (found, options) = drawn(kind, *flags)
    assert found == conditions and options.get("n") == n


def test_options_reach_the_pipeline(drawn):
    flags = "--steps=5 --guidance_scale=2.5 --seed=3 --batch_size=2 --raw --step=8".split()
    opened, (_, options) = drawn("classes", *flags, "--config.sampler.name=ddim")
    assert opened == {"step": 8, "ema": False, "overrides": ["--config.sampler.name=ddim"]}
    assert options == {"num_steps": 5, "guidance_scale": 2.5, "seed": 3, "batch_size": 2}


@pytest.mark.parametrize(("kind", "channels"), [("classes", 1), ("text", 3)])
def test_pictures_are_read_as_the_model_works_on_them(drawn, tmp_path, kind, channels):
    Image.new("RGBA", (6, 5), (255, 0, 0, 255)).save(tmp_path / "image.png")
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "mask.png")
    flags = [f"--image={tmp_path}/image.png", f"--mask={tmp_path}/mask.png"]
    flags += ["--prompt=x"] if kind == "text" else []
    options = drawn(kind, *flags)[1][1]
    assert options["image"].shape == (5, 6, channels) and options["image"].dtype == np.uint8
    assert options["mask"].dtype == np.float32 and options["mask"].ravel().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("classes", ["--class=3", "--prompt=x"], "give --class=3 or --prompt='x', not both"),
        ("classes", ["--prompt=x"], "--prompt='x' does not fit: this model reads no text"),
        ("text", ["--class=3"], 'this model reads text: give --prompt="..."'),
        ("text", [], 'this model reads text: give --prompt="..."'),
        ("classes", ["--image=none.png"], "--image=none.png does not exist"),
        ("classes", ["--checkpoint=x.ckpt"], "give --workdir=RUN, or --checkpoint=FILE with"),
    ],
)
def test_what_does_not_fit_is_one_sentence(drawn, kind, flags, message):
    assert message in drawn(kind, *flags)


def test_files_that_are_no_pictures_are_one_sentence(drawn, tmp_path):
    message = "--image=/etc/passwd is not a readable image (it begins as no known format does)"
    assert message in drawn("classes", "--image=/etc/passwd")
    assert f"--mask={tmp_path} is not a file" in drawn("classes", f"--mask={tmp_path}")


def test_images_that_are_not_finite_are_written_and_the_exit_code_says_so(
    drawn, monkeypatch, tmp_path, capsys
):
    def call(self, conditions, **options):
        warnings.warn("1 of 3 images hold NaN or infinity: 2", NonFiniteWarning, stacklevel=2)
        return np.zeros((3, 4, 4, 1), np.uint8)

    monkeypatch.setattr(Pipeline, "__call__", call)
    assert main(["sample", "--workdir=classes", f"--out={tmp_path}/bad"]) == 1
    assert capsys.readouterr().err == "warning: 1 of 3 images hold NaN or infinity: 2\n"
    assert len([*(tmp_path / "bad").iterdir()]) == 4


def test_a_file_needs_its_config_and_a_folder_has_to_be_empty(drawn, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    save_weights(file, [], {"out.2.weight": np.zeros((8, 3, 3, 3))})
    assert main(["sample", f"--checkpoint={file}", f"--out={tmp_path}/new"]) == 2
    assert "x.safetensors needs --config=, because no shipped" in capsys.readouterr().err
    (tmp_path / "mine.txt").touch()
    assert main(["sample", "--workdir=classes", f"--out={tmp_path}"]) == 2
    assert "already holds files; choose an empty folder with --out" in capsys.readouterr().err
    for out in ("mine.txt", "mine.txt/below"):
        assert main(["sample", "--workdir=classes", f"--out={tmp_path}/{out}"]) == 2
        assert "mine.txt is a file; choose an empty folder with --out" in capsys.readouterr().err


def test_loras_are_added_each_with_its_weight(drawn, monkeypatch):
    given = []
    monkeypatch.setattr(Pipeline, "with_lora", lambda self, loras: given.append(loras) or self)
    drawn("text", "--prompt=a fox", "--lora=x:0.5", "--lora=y")
    assert given == [{"x": 0.5, "y": 1.0}]


@pytest.mark.parametrize("bad", [0, 2])
def test_the_exit_code_and_stderr_tell_of_values_that_are_not_finite(monkeypatch, capsys, bad):
    calls = []

    def call(self, conditions, **options):
        calls.append((conditions, options))
        if bad:
            warnings.warn(f"{bad} images hold NaN", NonFiniteWarning, stacklevel=2)
        return np.zeros((4, 2, 2, 1), np.uint8)

    monkeypatch.setattr(Pipeline, "__call__", call)
    config = "configs/mnist.py:tiny"
    weights = trained(config)
    pipe = Pipeline(built(config), weights.params, weights.frozen)
    options = {"num_steps": 3, "seed": 7, "n": 4}
    code = draw(pipe, Call([1], options, lambda drawn: f"wrote {len(drawn)}"))
    assert calls == [([1], options)]
    said = capsys.readouterr()
    assert said.out == "wrote 4\n"
    assert said.err == (f"warning: {bad} images hold NaN\n" if bad else "")
    assert code == (1 if bad else 0)
