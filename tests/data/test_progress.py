"""Lines by the clock, not by the item."""

import io
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


def test_every_number_is_read_once_and_errors_are_raised():
    seen = []
    assert progress.for_each(150, seen.append, "x") >= 0.0
    assert sorted(seen) == list(range(150))
    assert progress.for_each(0, seen.append, "x") >= 0.0 and len(seen) == 150
    with pytest.raises(ZeroDivisionError):
        progress.for_each(70, lambda number: 1 // (number - 69), "x")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_is_gone_at_the_end(monkeypatch, caplog):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", -1.0)
    with caplog.at_level(logging.INFO):
        assert list(progress.log_progress(iter("abcd"), 4, "reading")) == list("abcd")
    drawn = progress.sys.stderr.getvalue().split("\r")
    assert [line.split()[2:5] for line in drawn if "reading" in line] == [
        [str(n), "of", "4,"] for n in (1, 2, 3)
    ]
    assert "████████░░░░░░░░ 2 of 4" in drawn[2] and not drawn[-1].strip() and not caplog.messages


def test_the_bar_goes_when_the_reader_stops(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    items = progress.log_progress(iter("abcd"), 4, "reading")
    next(items)
    items.close()
    assert progress.sys.stderr.getvalue().endswith(" \r")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "░░░░"), (0.5, "██░░"), (1.0, "████"), (7.0, "████"), (0.28125, "█▏░░")],
)
def test_bars_have_the_length_of_their_share(share, text):
    assert progress.bar(share, 4) == text
