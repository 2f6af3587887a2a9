"""`evaluate` prints what the library found."""

import pytest

from diffusion_jax.cli import evaluate, main
from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.runs.measuring.evaluation import Evaluation
from diffusion_jax.runs.measuring.levels import BITS


@pytest.mark.parametrize(
    ("bits", "last"), [(None, "test/loss_ema"), (1.25, "first 16 images"), (2.0, "first 16 images")]
)
def test_every_loss_is_a_line_and_bits_say_over_how_many_images(monkeypatch, capsys, bits, last):
    asked = []

    def evaluate_run(workdir, split, *, step, overrides):
        asked.append((workdir, split, step, overrides))
        found = None if bits is None else {BITS: bits, f"{BITS}_ci": 0.25}
        return Evaluation(8, 250, {"test/loss_ema": 0.5, "test/loss": 2 / 3}, found, 16)

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


def test_losses_by_noise_level_are_a_table(monkeypatch, capsys):
    levels = {"levels/00_sigma": 0.01, "levels/00": 0.9, "levels/00_ci": 0.1}
    found = Evaluation(8, 250, {"test/loss": 0.5}, None, 16, levels)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *given, **options: found)
    assert main(["evaluate", "--workdir=runs/x"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == "sigma 0.01 loss 0.9 ± 0.1".split()


def test_bits_are_a_line_for_raw_and_for_averaged_weights(monkeypatch, capsys):
    bits = {BITS: 4.0, f"{BITS}_ci": 0.5, f"{BITS}_ema": 3.0, f"{BITS}_ci_ema": 0.25}
    found = Evaluation(8, 250, {"test/loss": 0.5}, bits, 16)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *given, **options: found)
    assert main(["evaluate", "--workdir=runs/x"]) == 0
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert told[0] == "test/bits_per_dim 4.0000, at most, over the first 16 images (± 0.5)"
    assert told[1] == "test/bits_per_dim_ema 3.0000, at most, over the first 16 images (± 0.25)"


def test_metrics_go_to_the_library_and_are_a_line_each(monkeypatch, capsys):
    asked = []

    def score_run(workdir, options, *, step, overrides, samples):
        asked.append((workdir, options, step, overrides, samples))
        return {"mind_net": 0.25, "copied_net": 0.5}

    monkeypatch.setattr(evaluate, "score_run", score_run)
    flags = "--metrics=mind,recall --num_samples=64 --samples=s.npz --step=3 --split=test".split()
    assert main(["evaluate", "--workdir=runs/x", *flags]) == 0
    options = ScoringOptions(metrics=("mind", "recall"), num_samples=64, split="test")
    assert asked == [("runs/x", options, 3, [], "s.npz")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:3] == [["mind_net", "0.25"], ["copied_net", "0.5"]]


def test_flags_of_metrics_alone_are_refused(capsys):
    assert main(["evaluate", "--workdir=runs/x", "--num_samples=64"]) == 2
    assert "--num_samples should come with --metrics" in capsys.readouterr().err
