"""The two counts of tests/faults, at the end of every session that tried some of its cases."""

from collections import Counter
from typing import Any

WORDS = {"faults": "survived", "bad inputs": "answered in one clear sentence"}


def counts(reports: dict[str, list[Any]]) -> dict[str, tuple[int, int]]:
    """Count {kind: (tried, good)} from what tests have recorded, whichever process ran them."""
    found = Counter(
        tuple(pair)
        for group in reports.values()
        for report in group
        if getattr(report, "when", None) == "call"
        for pair in report.user_properties
    )
    return {kind: (found["tried", kind], found["good", kind]) for kind in WORDS}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind, (tried, good) in counts(terminalreporter.stats).items():
        if tried:
            terminalreporter.write_line(f"{kind} tried {tried}, {WORDS[kind]} {good}")
