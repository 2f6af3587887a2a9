import pytest

from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.loop import Event

OPTIONS = {"monitor": "val", "patience": 2}


def stops_at(values, **options):
    scores = {}
    hook = early_stopping(scores, **OPTIONS | options)
    for i, value in enumerate(values, start=1):
        step = 10 * i
        assert hook.act(Event(step - 5, None, {}, None, 0.0)) is None
        scores[step] = {"val": value, "other": 0.0}
        stop = hook.act(Event(step, None, {}, None, 0.0))
        if stop is not None:
            return step, stop.reason
    return None


def test_stops_after_patience_validations_without_improvement():
    step, reason = stops_at([5.0, 4.0, 4.5, 4.1, 1.0])
    assert step == 40
    assert reason == "val did not improve in 2 validations on 4, its value at step 20"


def test_improvement_starts_the_count_anew():
    assert stops_at([5.0, 5.5, 4.0, 4.5, 3.0, 3.5]) is None


def test_mode_max():
    assert stops_at([5.0, 4.0, 4.5], mode="max")[0] == 30
    assert stops_at([5.0, 6.0, 7.0, 8.0], mode="max") is None


def test_min_delta():
    assert stops_at([5.0, 4.95, 4.9], min_delta=0.2)[0] == 30
    assert stops_at([5.0, 4.7, 4.4], min_delta=0.2) is None
    # small steps add up: the count runs from the last value that counted
    assert stops_at([5.0, 4.9, 4.7, 4.6], min_delta=0.2) is None


def test_nan_never_improves():
    assert stops_at([5.0, float("nan"), float("nan")])[0] == 30
    assert stops_at([float("nan"), 5.0, 4.0]) is None


def test_restored_scores_go_on_counting():
    scores = {10: {"val": 1.0}, 20: {"val": 2.0}}
    hook = early_stopping(scores, monitor="val", patience=2)
    scores[30] = {"val": 2.0}
    assert hook.act(Event(30, None, {}, None, 0.0)) is not None


def test_a_run_that_was_stopped_does_not_train_again():
    hook = early_stopping({10: {"val": 1.0}, 20: {"val": 2.0}, 30: {"val": 3.0}}, **OPTIONS)
    assert hook.start(20) is None
    assert hook.start(35) == hook.act(Event(30, None, {}, None, 0.0))
    assert hook.start(35).reason.startswith("val did not improve in 2 validations on 1,")
    assert early_stopping({}, **OPTIONS).start(0) is None


def test_a_monitor_that_is_not_reported():
    with pytest.raises(ValueError, match="watches 'fid', .* reports other, val"):
        stops_at([1.0], monitor="fid")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "low"}, "min, max"),
        ({"patience": 0}, "patience = 0 should be at least 1"),
        ({"min_delta": -1.0}, "min_delta = -1.0 should be at least 0"),
        ({"min_delta": float("nan")}, "min_delta = nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        early_stopping({}, **OPTIONS | options)
