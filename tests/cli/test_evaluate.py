"""`evaluate` prints what the library found."""

import pytest

from diffusion_jax.cli import evaluate, main
from diffusion_jax.runs.evaluation import Evaluation


@pytest.mark.parametrize(
    ("bits", "last"), [(None, "test/loss_ema"), (1.25, "first 16 images"), (2.0, "first 16 images")]
)
def test_every_loss_is_a_line_and_bits_say_over_how_many_images(monkeypatch, capsys, bits, last):
    asked = []

    def evaluate_run(workdir, split, *, step, overrides):
        asked.append((workdir, split, step, overrides))
        return Evaluation(8, 250, {"test/loss_ema": 0.5, "test/loss": 2 / 3}, bits, 16)

    monkeypatch.setattr(evaluate, "evaluate_run", evaluate_run)
    flags = ["--split=validation", "--step=8", "--config.train.batch_size=4"]
    assert main(["evaluate", "--workdir=runs/x", *flags]) == 0
    assert asked == [("runs/x", "validation", 8, ["--config.train.batch_size=4"])]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/x, step 8, 250 records of validation:"
    assert [line.split() for line in lines[1:3]] == [
        ["test/loss", "0.666667"], ["test/loss_ema", "0.5"],
    ]  # fmt: skip
    assert last in lines[-1] and len(lines) == (3 if bits is None else 4)
    assert bits is None or f"validation/bits_per_dim {bits:.4f}," in " ".join(lines[-1].split())
