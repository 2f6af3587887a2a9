"""Averages of any length of a run: met from its checkpoint and snapshots, written as a run."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built
from support.trees import drawn

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.optimizer import build_optimizer
from diffusion_jax.runs import averages
from diffusion_jax.runs.averages import (
    Row,
    average,
    save_sweep,
    sweep,
    sweep_lines,
    write_average,
)
from diffusion_jax.runs.folder import save_config
from diffusion_jax.runs.weights import load_trained
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.power_ema import Profile, exponent_of, find_tracks, fit, pack, unpack
from diffusion_jax.train.state import init_state

KEEPS = ("--config.ema.power=(0.05, 0.1)",)


@pytest.fixture
def saved(workdir, monkeypatch):
    """Make a run of random numbers with a checkpoint and snapshots -> (experiment, state, them).

    Its parameters are few, and its optimizer is that of the config.
    """

    def make(*options, averages_at=(60, 80)):
        config = load_config("configs/mnist.py:tiny", list(options))
        whole = built("configs/mnist.py:tiny", *options)
        params = {"network": {"w": jnp.zeros((8, 6)), "b": jnp.zeros(6)}}
        tx = build_optimizer(config.optimizer.to_dict(), None, 1, False, ema=whole.ema).tx
        task = whole.task._replace(init=lambda key: init_state(params, tx), rules=())
        experiment = whole._replace(task=task)
        monkeypatch.setattr(averages, "open_run", lambda *given, **options: (experiment, {}))
        state = drawn(experiment.abstract_state())._replace(step=jnp.int32(100))
        workdir.mkdir()
        save_config(workdir, config)
        save(workdir / "checkpoints", 100, state, {"next_batch": 100})
        found, packed = find_tracks(state.opt_state), {}
        for at in averages_at if found is not None else ():
            packed[at] = pack(drawn(found.tracks[1], at))
            save(workdir / averages.SNAPSHOTS, at, packed[at], {})
        return experiment, state, packed

    return make


def save(folder, step, tree, metadata):
    checkpoints = open_checkpoints(folder, keep_last=9)
    checkpoints.save(step, tree, metadata)
    checkpoints.close()


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_an_average_is_the_sum_of_what_was_kept(workdir, saved):
    experiment, state, packed = saved(*KEEPS)
    found = average(experiment, workdir, 0.075)
    exponents = [exponent_of(length) for length in (0.05, 0.1)]
    kept = [Profile(100, exponents[0]), Profile(100, exponents[1])]
    kept += [Profile(at, exponents[1], 2.0**-12) for at in (60, 80)]
    weights, distance = fit(kept, Profile(100, exponent_of(0.075)))
    trees = [*find_tracks(state.opt_state).tracks, *map(unpack, packed.values())]
    columns = zip(*map(leaves, trees), strict=True)
    expected = [sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in columns]
    for own, wanted in zip(leaves(found.params), expected, strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6)
    assert found.distance == distance < 0.2


def test_a_run_with_another_average_is_read_like_any_run(workdir, saved):
    experiment, state, _ = saved(*KEEPS)
    folder, found = write_average(workdir, 0.075)
    assert folder == workdir / "ema" / "0.075_100"
    expected = average(experiment, workdir, 0.075).params
    read = load_trained(experiment, folder)
    for own, wanted in zip(leaves(read.params), leaves(expected), strict=True):
        np.testing.assert_array_equal(own, wanted)
    raw = load_trained(experiment, folder, ema=False)
    np.testing.assert_array_equal(leaves(raw.params)[0], leaves(state.params)[0])
    with pytest.raises(ValueError, match="already holds files"):
        write_average(workdir, 0.075)


def test_a_run_without_an_average_of_its_own_gets_it_as_parameters(workdir, saved, tmp_path):
    options = (*KEEPS, "--config.optimizer.ema_decay=None")
    experiment, _, _ = saved(*options)
    folder, found = write_average(workdir, 0.1, out=tmp_path / "new")
    read = load_trained(experiment, folder, ema=False)
    for own, wanted in zip(leaves(read.params), leaves(found.params), strict=True):
        np.testing.assert_array_equal(own, wanted)


def test_a_sweep_compares_lengths_and_is_a_table_and_a_file(workdir, saved, monkeypatch):
    _, state, _ = saved(*KEEPS)
    monkeypatch.setattr(
        averages,
        "build_losses",
        lambda *given, prefix: (
            lambda params, mutable: {f"{prefix}/loss": float(sum(x.sum() for x in leaves(params)))}
        ),
    )
    rows = list(sweep(workdir, [0.05, 0.1]))
    assert [row.weights for row in rows] == ["raw", "ema", "0.05", "0.1"]
    own = ema_params(state.opt_state)
    tracks = find_tracks(state.opt_state).tracks
    for row, tree in zip(rows, (state.params, own, *tracks), strict=True):
        total = sum(x.sum() for x in leaves(tree))
        assert row.found["validation/loss"] == pytest.approx(total, rel=1e-3, abs=1e-2)
    lines = sweep_lines(rows)
    assert lines[0].split() == ["length", "distance", "validation/loss"]
    assert [line.split()[0] for line in lines[1:]] == ["raw", "ema", "0.05", "0.1"]
    save_sweep(workdir / "ema" / "sweep.csv", rows)
    with (workdir / "ema" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["validation/loss"]) for row in table] == [
        row.found["validation/loss"] for row in rows
    ]


def test_metrics_are_columns_too(workdir, saved, monkeypatch):
    saved(*KEEPS)
    monkeypatch.setattr(averages, "build_losses", lambda *g, prefix: lambda p, m: {"loss": 1.0})
    monkeypatch.setattr(averages, "build_score", lambda *given: lambda params: {"mind": 2.0})
    rows = sweep(workdir, [0.1], scoring=averages.ScoringOptions())
    assert next(rows) == Row("raw", None, {"loss": 1.0, "mind": 2.0})


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ((), 0.1, r"config\.ema\.power = \(\) should be two or more lengths"),
        (KEEPS, 0.5, "length = 0.5 should be above 0 and at most 0.28"),
    ],
)
def test_what_cannot_be_averaged_is_said(workdir, saved, options, length, message):
    saved(*options, averages_at=())
    with pytest.raises(ValueError, match=message):
        write_average(workdir, length)
