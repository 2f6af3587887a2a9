"""Signals are noted, or end the run at once where nothing is to save."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from diffusion_jax.train.hooks.received import (
    Interrupted,
    handle_signals,
    interruptible,
    interruptible_batches,
)

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in NUMBERS]
    with pytest.raises(RuntimeError), handle_signals():
        raise RuntimeError
    assert before == [signal.getsignal(n) for n in NUMBERS]


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handle_signals() as received, interruptible(received):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_where_nothing_is_to_save_a_signal_interrupts_at_once(number):
    with handle_signals() as received:
        with pytest.raises(Interrupted, match=number.name), interruptible(received):
            os.kill(os.getpid(), signal.SIGUSR1)  # is kept for the first step
            os.kill(os.getpid(), number)
            time.sleep(5)
            raise AssertionError("it came too late")
        received.clear()
        os.kill(os.getpid(), number)  # and outside of the block it is noted
        assert list(received) == [number]
        with pytest.raises(Interrupted, match=number.name), interruptible(received):
            raise AssertionError("it came before")
    with handle_signals() as received, interruptible(received):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert list(received) == [signal.SIGUSR1]


def test_a_second_term_while_the_last_save_is_written_changes_nothing():
    with handle_signals() as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert list(received) == 3 * [signal.SIGTERM]


def test_an_inner_block_notes_in_the_outer_deque_and_leaves_its_handlers():
    with handle_signals() as outer, interruptible(outer):
        with handle_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)  # noted: the inner block may have to save
        assert inner is outer and list(outer) == [signal.SIGTERM]
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_another_thread_sets_no_handlers():
    before, found = [signal.getsignal(n) for n in NUMBERS], []

    def work():
        with handle_signals() as received, interruptible(received):
            found.append([signal.getsignal(n) for n in NUMBERS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert found == [before]


def test_a_signal_does_not_wait_for_a_batch_that_does_not_come():
    def batches():
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with handle_signals() as received:
        source = interruptible_batches(batches(), received)
        assert next(source) == 1
        with pytest.raises(Interrupted, match="SIGTERM"):
            next(source)
        assert list(interruptible_batches([1, 2], type(received)())) == [1, 2]


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from diffusion_jax.train.hooks.received import handle_signals
    assert "jax" not in sys.modules
    with handle_signals():
        print("ready", flush=True)
        while True:
            time.sleep(1)
    """
)


def test_the_second_interrupt_says_that_the_third_one_ends_the_process():
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=pipe, stderr=pipe)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    for said in (b"saving after this step", b"once more to quit at once and lose"):
        process.send_signal(signal.SIGINT)
        assert said in os.read(process.stderr.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
