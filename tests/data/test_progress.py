"""Lines by the clock, not by the item."""

import logging

import pytest

from diffusion_jax.data import progress


@pytest.mark.parametrize(("seconds", "expected"), [(4.0, ["x: 3 of 9", "x: 6 of 9"]), (0.1, [])])
def test_lines_by_the_clock(monkeypatch, caplog, seconds, expected):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    found = []
    with caplog.at_level(logging.INFO):
        for item in progress.log_progress(iter("abcdefghi"), 9, "x"):
            found.append(item)
            clock.now += seconds
    assert found == list("abcdefghi")
    assert [message.partition(",")[0] for message in caplog.messages] == expected


def test_items_of_several_sizes_and_the_time_that_is_left(monkeypatch, caplog):
    """2 + 4 of 10 took 22 seconds, so 4 will take 14.7."""
    times = iter([0.0, 0.0, 9.0, 22.0])
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": lambda: next(times)}))
    with caplog.at_level(logging.INFO):
        assert list(progress.log_progress([2, 4, 4], 10, "x", size=int)) == [2, 4, 4]
    assert caplog.messages == ["x: 6 of 10, 0.3 a second, 0 min 14 s left"]
