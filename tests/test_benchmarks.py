"""The benchmarks run, and refuse what would be no comparison; PyTorch's side is not needed here."""

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Let the scripts import each other, as they do when they are started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("paired", "train_step", "sample"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name, unit", [("train_step", "step"), ("sample", "batch")])
def test_our_side_runs_and_prints_its_times(scripts, capsys, name, unit):
    module = __import__(name)
    [numbers] = module.main(["--no_peer", "--nets=tiny", "--rounds=2", "--repeats=1"])
    assert len(numbers["ours"]) == 2 and all(round_.wall > 0 for round_ in numbers["ours"])
    said = capsys.readouterr().out
    assert re.search(rf"tiny: configs/mnist.py:tiny, a {unit} of 8 images", said)
    assert re.search(rf"{unit}, least +\d+\.\d+ s", said)


def test_an_unknown_net_is_refused_with_the_choices(scripts, capsys):
    import paired

    with pytest.raises(SystemExit):
        paired.parse(["--nets=demo,cifar"], "", nets="demo")
    assert "'cifar' is unknown; choose from demo, wide28, cifar10, tiny" in capsys.readouterr().err


def test_networks_of_different_size_are_refused(scripts):
    import paired

    paired.same_size(1_000_000, 1_020_000)
    with pytest.raises(ValueError, match="1,000,000 parameters here, 1,050,000 in PyTorch"):
        paired.same_size(1_000_000, 1_050_000)


def test_the_ratio_pairs_the_rounds(scripts):
    import paired

    ours, theirs = object.__new__(paired.Side), object.__new__(paired.Side)
    # The second round was disturbed: twice as long on both sides, which a paired ratio ignores.
    ours.rounds = [paired.Round(1.0, 1.0), paired.Round(2.0, 1.0), paired.Round(1.0, 1.0)]
    theirs.rounds = [paired.Round(3.0, 2.0), paired.Round(6.0, 2.0), paired.Round(4.0, 2.0)]
    assert paired.ratios(ours, theirs) == {
        "median": 3.0,
        "lowest": 3.0,
        "highest": 4.0,
        "least": 3.0,
        "cpu": 2.0,
    }
