import collections
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.checkpoints.saving import saved_steps
from diffusion_jax.train.hooks import signals as module
from diffusion_jax.train.hooks.received import handle_signals
from diffusion_jax.train.hooks.signals import signal_hook
from diffusion_jax.train.loop import Event, Hook, Stop, train


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


def run(send, num_steps=6):
    """Send signals to this process as {step: signal}; return the steps that were saved."""
    saved = []

    def save(event, stop):
        if stop is None or stop.save:
            saved.append(event.step)

    with handle_signals() as received:
        sender = Hook(lambda step: step in send, lambda e: os.kill(os.getpid(), send[e.step]))
        hooks = [sender, signal_hook(received, save), Hook(lambda step: False, save, save)]
        state = State(jnp.int32(0))
        _, stop = train(state, lambda s, b: _step(s), iter(int, 1), hooks, num_steps=num_steps)
    return saved, stop


def test_usr1_saves_and_goes_on():
    assert run({3: signal.SIGUSR1}) == ([3, 6], None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_term_and_interrupt_stop_and_save(number):
    assert run({3: number}) == ([3], Stop(number.name))


def test_several_processes_act_at_the_same_step(monkeypatch):
    """The other process has SIGTERM at its second question; this one must learn it and stop."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = iter([[0, 0], [1, 0], [0, signal.SIGTERM], [0, 0]])
    monkeypatch.setattr(
        module,
        "_maximum_over_processes",
        lambda ours: np.maximum(ours, np.asarray(next(others), np.int32)),
    )
    saved = []
    with handle_signals() as received:
        hook = signal_hook(received, lambda event, stop: saved.append(event.step), agree_every=10)
        assert [step for step in range(1, 31) if hook.due(step)] == [10, 20, 30]
        results = [hook.act(Event(step, None, {}, None, 0.0)) for step in (10, 20, 30, 40)]
    assert results == [None, None, None, Stop("SIGTERM")]
    assert saved == [30]


def test_the_maximum_is_over_all_devices():
    got = module._maximum_over_processes(np.array([1, 15], np.int32))
    assert np.asarray(got).tolist() == [1, 15]


SCRIPT = textwrap.dedent(
    """
    import sys, time
    import jax, jax.numpy as jnp
    from typing import NamedTuple
    from diffusion_jax.train.checkpoints.saving import open_checkpoints
    from diffusion_jax.train.hooks.checkpoint import checkpoint
    from diffusion_jax.train.loop import Hook, train
    from diffusion_jax.train.hooks.received import handle_signals
    from diffusion_jax.train.hooks.signals import signal_hook

    class State(NamedTuple):
        step: jax.Array
        params: jax.Array

    update = jax.jit(lambda s: (State(s.step + 1, s.params + 1), {"loss": s.params.sum()}))

    def slow(state, batch):
        time.sleep(0.01)
        return update(state)

    checkpoints = open_checkpoints(sys.argv[1], keep_last=99)
    saver = checkpoint(checkpoints, {}, every=10**6)
    with handle_signals() as received:
        hooks = [
            signal_hook(received, saver.end),
            Hook(lambda s: True, lambda e: print(e.step, *checkpoints.all_steps(), flush=True)),
            saver,
        ]
        state = State(jnp.int32(0), jnp.zeros(8))
        state, stop = train(state, slow, iter(int, 1), hooks, num_steps=10**6)
    checkpoints.close()
    print("STOP", stop.reason, int(state.step))
    """
)


def start(script, *arguments, seen="3"):
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if seen:
        read_until(process, lambda words: words[0] == seen)
    return process


def read_until(process, condition):
    for line in process.stdout:
        if line.split() and condition(line.split()):
            return line.split()
    raise AssertionError(f"the process ended: {process.communicate()[1][-2000:]}")


def test_a_process_saves_on_usr1_shows_stacks_on_usr2_and_ends_on_term(tmp_path):
    process = start(SCRIPT, tmp_path)
    process.send_signal(signal.SIGUSR1)
    read_until(process, lambda words: len(words) == 2)  # one checkpoint, and it goes on
    process.send_signal(signal.SIGUSR2)
    now = int(read_until(process, lambda words: True)[0])
    read_until(process, lambda words: int(words[0]) >= now + 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = saved_steps(tmp_path)[-1]
    assert out.splitlines()[-1] == f"STOP SIGTERM {last}"
    assert len(saved_steps(tmp_path)) == 2
    assert "most recent call first" in err and "in train" in err


def test_usr2_opens_a_debugger_in_a_terminal(tmp_path):
    terminal = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"
    script = "import os; print('PID', os.getpid(), flush=True)\n" + SCRIPT
    process = subprocess.Popen(
        [sys.executable, "-c", terminal, sys.executable, "-c", script, str(tmp_path), "end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)

    def until(pattern, seconds=60):
        text, deadline = "", time.monotonic() + seconds
        while time.monotonic() < deadline:
            text += (process.stdout.read() or b"").decode(errors="replace")
            if found := re.search(pattern, text):
                return found
            time.sleep(0.01)
        raise AssertionError(f"{pattern} is not in {text[-2000:]}")

    def enter(line):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()

    try:
        pid = int(until(r"PID (\d+)")[1])
        until(r"\n3\s")
        os.kill(pid, signal.SIGUSR2)
        until(r"(?s)most recent call first.*in train.*\(Pdb\)")
        enter("p 6 * 7")
        until(r"\n42\s")
        enter("continue")
        until(r"\n\d+\s")  # steps go on
        os.kill(pid, signal.SIGTERM)
        until(r"STOP SIGTERM")
    finally:
        process.stdin.close()
        assert process.wait(60) == 0


PROCESSES = textwrap.dedent(
    """
    import sys, time
    import jax
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
    import jax.numpy as jnp, numpy as np
    from typing import NamedTuple
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from diffusion_jax.train.checkpoints.saving import open_checkpoints, saved_steps
    from diffusion_jax.train.hooks.checkpoint import checkpoint
    from diffusion_jax.train.loop import Hook, train
    from diffusion_jax.train.hooks.received import handle_signals
    from diffusion_jax.train.hooks.signals import signal_hook

    def say(*words):  # in one write, for Gloo prints in between
        sys.stdout.write(" ".join(map(str, ("\\n", *words, "\\n"))))
        sys.stdout.flush()

    class State(NamedTuple):
        step: jax.Array
        params: jax.Array

    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    places = State(NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))

    @jax.jit
    def update(state):
        return State(state.step + 1, state.params + 1), {"loss": state.params.sum()}

    def slow(state, batch):
        time.sleep(0.01)
        return update(state)

    state = jax.jit(lambda: State(jnp.int32(0), jnp.zeros((16, 4))), out_shardings=places)()
    checkpoints = open_checkpoints(sys.argv[1], keep_last=99)
    if saved_steps(sys.argv[1]):
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        state, _ = checkpoints.restore(abstract)
    saver = checkpoint(checkpoints, {}, every=10**6)
    with handle_signals() as received:
        hooks = [
            signal_hook(received, saver.end),
            Hook(lambda s: True, lambda e: say("at", *checkpoints.all_steps())),
            saver,
        ]
        state, stop = train(state, slow, iter(int, 1), hooks, num_steps=10**6)
    checkpoints.close()
    say("STOP", stop.reason, int(state.step))
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("steps_before", [0, 2])
def test_two_processes_agree_on_a_signal_to_one_of_them(tmp_path_factory, steps_before):
    """Save and end together; the second case goes on from the checkpoints of the first."""
    directory = tmp_path_factory.getbasetemp() / "two_processes"
    assert len(saved_steps(directory)) == steps_before
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = (start(PROCESSES, directory, port, rank, seen="") for rank in range(2))
    try:
        read_until(second, lambda words: words[0] == "at")
        second.send_signal(signal.SIGUSR1)
        read_until(second, lambda words: words[0] == "at" and len(words) == 2 + steps_before)
        first.send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=120)[0].splitlines() for process in (first, second)]
    finally:
        first.kill()
        second.kill()
    stops = {line.strip() for lines in ends for line in lines if "STOP" in line}
    assert stops == {f"STOP SIGTERM {saved_steps(directory)[-1]}"}
    assert len(saved_steps(directory)) == 2 + steps_before


def test_bad_options():
    with pytest.raises(ValueError, match="agree_every = 0 should be at least 1 step"):
        signal_hook(collections.deque(), lambda event, stop: None, agree_every=0)
