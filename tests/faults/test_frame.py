"""The frame tells a sentence from silence, tracebacks, walls of text and slowness."""

import sys
import time
from types import SimpleNamespace

import pytest
from faults import frame
from faults.frame import BadInput, Unanswered, build, judge, launch
from support.tally import counts


def mistyped(_):
    build("mnist", "optimizer.learning_rat=1")


def test_a_sentence_of_the_package_is_an_answer(tmp_path):
    said = judge(BadInput("", mistyped, r"learning_rat.*did you mean"), tmp_path)
    assert "optimizer.learning_rat" in said


def test_a_line_on_stderr_is_an_answer(tmp_path):
    flag = lambda _: launch("sample", "--sed=1")  # argparse puts its usage before the line
    case = BadInput("", flag, r"^'--sed=1' is not a flag of sample; did you mean '--seed'")
    assert judge(case, tmp_path).startswith("'--sed=1'")
    file = lambda _: launch("--config=configs/nope.py", f"--workdir={tmp_path / 'run'}")
    case = BadInput("", file, r"^error: .*configs/nope\.py does not exist")
    assert judge(case, tmp_path).startswith("error: ")


def says(text):
    """Something that raises a message from inside the package."""

    def act(_):
        source = compile(
            "def act(text): raise ValueError(text)", str(frame.PACKAGE / "x.py"), "exec"
        )
        exec(source, names := {})
        names["act"](text)

    return act


def slow(_):
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    says("x = 1 should be 2")(_)


@pytest.mark.parametrize(
    ("act", "pattern", "why"),
    [
        (lambda _: None, "", "accepted without a word"),
        (lambda _: int("x"), "", "ValueError from outside the package"),
        (lambda _: launch("options", "--help"), "", "accepted without a word"),
        (says("one\ntwo"), "", "2 lines instead of one"),
        (says(""), "", "0 lines instead of one"),
        (says("x = 1 should be 2"), "y = 1", "does not match"),
        (slow, "", "answered after 0"),
    ],
)
def test_what_is_no_answer(monkeypatch, tmp_path, act, pattern, why):
    if act is slow:
        monkeypatch.setattr(frame, "SECONDS", 0.1)
    with pytest.raises(Unanswered, match=why):
        judge(BadInput("", act, pattern), tmp_path)


def test_a_traceback_of_a_command_is_no_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(frame, "main", lambda words: 1 // 0)
    with pytest.raises(Unanswered, match="a traceback that ends in ZeroDivisionError"):
        judge(BadInput("", lambda _: launch("report"), ""), tmp_path)


def test_all_that_a_command_writes_to_stderr_is_judged(monkeypatch, tmp_path):
    def main(_):
        print("first\nerror: second", file=sys.stderr)
        return 2

    monkeypatch.setattr(frame, "main", main)
    with pytest.raises(Unanswered, match="2 lines instead of one"):
        judge(BadInput("", lambda _: launch("report"), "second"), tmp_path)


def test_cases_are_counted_by_kind():
    report = lambda when, *pairs: SimpleNamespace(when=when, user_properties=list(pairs))
    tried, good = ("tried", "bad inputs"), ("good", "bad inputs")
    stats = {
        "passed": [report("call", tried, good), report("teardown", tried, good), report("call")],
        "failed": [report("call", tried), report("call", ("tried", "faults"))],
        "": [object()],
    }
    assert counts(stats) == {"bad inputs": (2, 1), "faults": (1, 0)}
