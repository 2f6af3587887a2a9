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
    assert caplog.messages == expected
