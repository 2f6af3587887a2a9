"""Bad inputs and faults: how a case is written, how it is judged, where it is counted.

A bad input is answered when one clear sentence comes within five seconds: an exception that the
package itself raises, or an exit code with one line on stderr. A fault is survived when what the
user cares for is still right afterwards. To add cases, write into any tests/faults/test_*.py:

    from faults.frame import BadInput, Fault, bad_inputs, build, faults, launch

    test_optimizers = bad_inputs([
        BadInput("b2 above 1", lambda _: build("mnist", "optimizer.b2=1.5"), "b2 = 1.5 should"),
        BadInput("a flag mistyped", lambda _: launch("sample", "--sed=1"), "did you mean"),
    ])

    def full_disk(folder): ...  # does the damage, then asserts what still has to hold

    test_disks = faults([Fault("a disk that is full during one save", full_disk)])

`act` takes an empty folder of its own. A case that is not answered yet says why in `known`: it is
counted as tried, and the test fails as soon as it is answered. `slow=True` leaves a case to
`make slow`. `make faults` runs them all and prints the two counts, which every run of pytest
prints for the cases that it had.
"""

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

import diffusion_jax
from diffusion_jax.cli import main
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config

SECONDS = 5.0
# The limit holds for a machine that does nothing else: here it is for the time of the processor,
# or for a clock that goes on for as long as a busy machine may need.
BUSY_SECONDS = 30.0
PACKAGE = Path(diffusion_jax.__file__).parent


class BadInput(NamedTuple):
    """What is wrong, a call that meets it in an empty folder, a pattern of the right answer."""

    name: str
    act: Callable[[Path], object]
    says: str
    known: str = ""
    slow: bool = False


class Fault(NamedTuple):
    """What goes wrong, and a call that does it and asserts what has to hold afterwards."""

    name: str
    act: Callable[[Path], object]
    known: str = ""
    slow: bool = False


class CommandFailed(Exception):
    """A command has ended with an exit code; the message is what it wrote to stderr."""


class Unanswered(Exception):
    """What the user gets is no sentence."""


def build(config: str, *overrides: str, devices: int = 1) -> object:
    """Make the experiment of configs/NAME.py:tiny with overrides such as `optimizer.b2=1.5`."""
    words = [f"--config.{override}" for override in overrides]
    tiny = load_config(f"configs/{config}.py:tiny", words)
    return make_experiment(tiny, devices=jax.devices()[:devices])


def launch(*words: object) -> str:
    """Run a command as `launch.py` does; return what it printed, or raise as its exit says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code
        except Exception as error:
            raise Unanswered(f"a traceback that ends in {type(error).__name__}: {error}") from error
    if code:
        usage, found, sentence = err.getvalue().rpartition(": error: ")
        is_usage = found and usage.startswith("usage: ")
        raise CommandFailed(sentence if is_usage else err.getvalue())
    return out.getvalue()


def sentence_of(error: Exception) -> str:
    """Return the one line that an error says to the user, or raise `Unanswered`."""
    if isinstance(error, Unanswered):
        raise error
    said = str(error).strip()
    if not said or "\n" in said:
        raise Unanswered(f"{len(said.splitlines())} lines instead of one: {said}")
    if not isinstance(error, CommandFailed):
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is None or not Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            raise Unanswered(f"{type(error).__name__} from outside the package: {said}")
    return said


def judge(case: BadInput, folder: Path) -> str:
    """Return the sentence that answers a case; raise `Unanswered` unless it is as it should be."""
    clock, cpu = time.monotonic(), time.process_time()
    try:
        case.act(folder)
    except Exception as error:
        said = sentence_of(error)
    else:
        raise Unanswered("accepted without a word")
    clock, cpu = time.monotonic() - clock, time.process_time() - cpu
    if min(clock, cpu) > SECONDS or clock > BUSY_SECONDS:
        raise Unanswered(f"answered after {clock:.1f} s, {cpu:.1f} s of them at work: {said}")
    if not re.search(case.says, said):
        raise Unanswered(f"{said!r} does not match {case.says!r}")
    return said


def bad_inputs(cases: Iterable[BadInput]) -> Callable[..., None]:
    """Make the test that every case is answered."""
    return _test_of(cases, "bad inputs", judge)


def faults(cases: Iterable[Fault]) -> Callable[..., None]:
    """Make the test that every fault is survived."""
    return _test_of(cases, "faults", lambda case, folder: case.act(folder))


def _test_of(
    cases: Iterable[Any], kind: str, holds: Callable[[Any, Path], object]
) -> Callable[..., None]:
    marks = lambda case: [pytest.mark.slow] if case.slow else []
    rows = [pytest.param(case, id=case.name, marks=marks(case)) for case in cases]

    # A signal ends what hangs, and the next case has its turn.
    @pytest.mark.timeout(120, method="signal")
    @pytest.mark.parametrize("case", rows)
    def test(case: Any, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
        record_property("tried", kind)  # read by support/tally.py, in whatever process
        try:
            holds(case, tmp_path)
        except (Exception, pytest.fail.Exception) as error:
            if case.known:
                pytest.xfail(case.known)
            if isinstance(error, Unanswered):
                pytest.fail(f"{case.name}: {error}", pytrace=False)
            raise
        record_property("good", kind)
        if case.known:
            pytest.fail(f"{case.name} is right now: take out {case.known!r}", pytrace=False)

    return test
