"""What happens to a run while it trains: afterwards, the same command ends where it would have."""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.frame import Fault, faults
from support.commands import run, start

from diffusion_jax.runs import hooks as run_hooks
from diffusion_jax.runs import training
from diffusion_jax.train import loop
from diffusion_jax.train.checkpoints.reading import load_params, saved_steps
from diffusion_jax.train.loop import Hook
from diffusion_jax.train.writers import read_jsonl

COMMAND = (
    "--config=configs/mnist.py:tiny", "--no_test", "--config.train.num_steps=6",
    "--config.checkpoint.every=2", "--config.checkpoint.keep_last=9",
    "--config.checkpoint.keep_best=0", "--config.hooks.scalars.every=1",
    "--config.hooks.validation.every=3", "--config.hooks.images=delete",
)  # fmt: skip
CLOCK = ("perf/", "time", "step")
# All cases run one config: it is traced and compiled once.
# They run whole trainings.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_experiments")]


def train(workdir, *more, at=(), batches=None):
    """Run the command; at: {step: what happens before the hooks of that step act}."""
    plain, source = loop.train, training.interruptible_batches

    def disturbed(state, step, source, hooks, **options):
        event = Hook(lambda n: n in at, lambda event: at[event.step]())
        return plain(state, step, source, [event, *hooks], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", disturbed)
        if batches is not None:
            patch.setattr(training, "interruptible_batches", lambda b, r: source(batches(b), r))
        return run(*COMMAND, f"--workdir={workdir}", *more, devices=1)


@functools.cache
def undisturbed():
    folder = Path(tempfile.mkdtemp()) / "run"
    code, said = train(folder)
    assert code == 0, said
    return rows(folder), params(folder)


def rows(workdir):
    return {
        (row["step"], name): value
        for row in read_jsonl(workdir / "metrics.jsonl")
        for name, value in row.items()
        if not name.startswith(CLOCK)
    }


def params(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(workdir / "checkpoints"))]


def same(workdir, *, metrics=True):
    """The run is at its end, and nothing in it differs from the undisturbed one."""
    expected_rows, expected = undisturbed()
    assert saved_steps(workdir / "checkpoints")[-1] == 6
    assert all(map(np.array_equal, params(workdir), expected))
    if metrics:
        assert rows(workdir) == expected_rows


def goes_on(workdir, step, *, metrics=True):
    """The same command goes on at this step and ends as if nothing had been."""
    code, said = train(workdir)
    assert code == 0 and f"continues at step {step}" in said, said
    same(workdir, metrics=metrics)


def one_line(said, *patterns):
    """Some line says it, and no traceback does."""
    assert "Traceback" not in said, said
    for pattern in patterns:
        found = [line for line in said.splitlines() if pattern in line]
        assert len(found) == 1, (pattern, said)


def raises(error):
    def act():
        raise error

    return act


# --- What raises or hangs


def data_that_raise(folder):
    def broken(source):
        yield from itertools.islice(source, 3)
        raise OSError("stale file handle")

    code, said = train(folder / "run", batches=broken)
    assert code == 2
    one_line(said, "error: cannot read the batch of step 4: stale file", "checkpoint of step 3 is")
    assert saved_steps(folder / "run/checkpoints") == [2, 3]
    goes_on(folder / "run", 3)


def a_hook_that_raises(folder):
    with pytest.raises(ZeroDivisionError):
        train(folder / "run", at={3: raises(ZeroDivisionError())})
    goes_on(folder / "run", 3)


def validation_that_raises(folder):
    def build(*args, **options):
        return raises_always

    def raises_always(state):
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_hooks, "build_evaluate", build)
        with pytest.raises(ZeroDivisionError):
            train(folder / "run")
    goes_on(folder / "run", 3, metrics=False)  # the one that failed is not there


def data_that_hang(folder):
    def hanging(source):
        yield from itertools.islice(source, 3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    code, said = train(folder / "run", batches=hanging)
    assert code == 75, said
    one_line(said, "stopped at step 3: SIGTERM")
    goes_on(folder / "run", 3)


def a_loss_that_is_nan(folder):
    def poisoned(source):
        for number, batch in enumerate(source, 1):
            bad = {"image": batch["image"] * np.float32(np.nan)} if number == 3 else {}
            yield batch | bad

    code, said = train(folder / "run", batches=poisoned)
    assert code == 3, said
    one_line(said, f" is nan at step 3; the last checkpoint from before is {folder}/run")
    assert saved_steps(folder / "run/checkpoints") == [2]
    goes_on(folder / "run", 2)


# --- Signals


def kill(*numbers):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def many_signals(folder):
    code, said = train(
        folder / "run", at={3: kill(signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)}
    )
    assert code == 75, said
    one_line(said, "stopped at step 3: SIGTERM")
    goes_on(folder / "run", 3)


def a_signal_while_the_last_save_is_written(folder):
    from diffusion_jax.train.checkpoints.folder import Folder

    settle = Folder.settle

    def with_signals(self):
        if self._saving == 3:
            kill(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)()
        settle(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "settle", with_signals)
        code, said = train(folder / "run", at={3: kill(signal.SIGTERM)})
    assert code == 75, said
    goes_on(folder / "run", 3)


def a_signal_in_the_test(folder):
    def slow_test(*args):
        kill(signal.SIGINT)()
        time.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_finish", slow_test)
        code, said = train(folder / "run")
    assert code == 75, said
    one_line(said, "SIGINT: nothing was to be saved; the same command goes on")
    goes_on(folder / "run", 6)


# --- Folders and disks


def when_saved(workdir, step, act):
    """Make what waits for the save of a step first, so that the fault hits the one after it."""

    def wait_and_act():
        deadline = time.monotonic() + 60
        while step not in saved_steps(workdir / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    return wait_and_act


def remove(checkpoints):
    when_saved(checkpoints.parent, 2, lambda: shutil.rmtree(checkpoints))()


def checkpoints_deleted(folder):
    code, said = train(folder / "run", at={3: lambda: remove(folder / "run/checkpoints")})
    assert code == 0, said
    one_line(said, f"{folder}/run/checkpoints is gone")
    same(folder / "run")


def checkpoints_replaced_by_a_file(folder):
    place = folder / "run/checkpoints"

    def replace():
        remove(place)
        place.write_text("")

    code, said = train(folder / "run", at={3: replace})
    assert code == 2, said
    one_line(said, f"cannot save step 4 in {place}", f"error: cannot save step 6 in {place}")


@contextlib.contextmanager
def mounted(place, megabytes=64):
    place.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", place])
    if made.returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def disk(*command):
    def act():
        subprocess.run(command, check=True)

    return act


def a_disk_that_is_read_only_for_a_while(folder):
    place = folder / "run/checkpoints"
    with mounted(folder / "disk"):
        place.parent.mkdir()
        (folder / "disk/checkpoints").mkdir()
        place.symlink_to(folder / "disk/checkpoints")
        save_for_start(folder / "run")
        code, said = train(
            folder / "run",
            at={
                3: when_saved(
                    folder / "run", 2, disk("mount", "-o", "remount,ro", folder / "disk")
                ),
                5: disk("mount", "-o", "remount,rw", folder / "disk"),
            },
        )
        assert code == 0, said
        one_line(said, "cannot save step 4")
        same(folder / "run")


def save_for_start(workdir):
    """A folder with checkpoints/ is taken for a run only with its config."""
    from diffusion_jax.experiment.config.files import load_config
    from diffusion_jax.runs.folder import save_config

    overrides = [word for word in COMMAND if word.startswith("--config.")]
    save_config(workdir, load_config("configs/mnist.py:tiny", overrides))


def fill(place):
    def act():
        with open(place / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    return act


def a_full_disk_for_one_save(folder):
    with mounted(folder / "disk", 64):
        code, said = train(
            folder / "disk/run",
            at={
                3: when_saved(folder / "disk/run", 2, fill(folder / "disk")),
                5: (folder / "disk/filler").unlink,
            },
        )
        assert code == 0, said
        one_line(said, "cannot save step 4 in")
        assert saved_steps(folder / "disk/run/checkpoints") == [2, 6]
        same(folder / "disk/run", metrics=False)


def a_full_disk_until_the_end(folder):
    with mounted(folder / "disk", 64):
        code, said = train(
            folder / "disk/run", at={5: when_saved(folder / "disk/run", 4, fill(folder / "disk"))}
        )
        assert code == 2, said
        assert "No space left on device (0.00 GiB are free)" in said.splitlines()[-1]
        one_line(said, "error: cannot save step 6")
        (folder / "disk/filler").unlink()
        goes_on(folder / "disk/run", 4)


def a_disk_that_is_unmounted(folder):
    with mounted(folder / "disk"):
        unmount = disk("umount", "-l", folder / "disk")
        at = {3: when_saved(folder / "disk/run", 2, unmount)}
        code, said = train(folder / "disk/run", at=at)
        one_line(said, f"{folder}/disk/run/checkpoints is gone")
        assert code == 0 and saved_steps(folder / "disk/run/checkpoints") == [4, 6]


def metrics_deleted(folder):
    code, said = train(folder / "run", at={3: (folder / "run/metrics.jsonl").unlink})
    assert code == 0, said
    one_line(said, "metrics.jsonl is gone")
    same(folder / "run", metrics=False)
    assert {step for step, _ in rows(folder / "run")} >= {4, 5, 6}


def metrics_replaced_by_a_folder(folder):
    def replace():
        # The writing thread makes a new file at once; so what lies there is moved away until the
        # folder is the first to stand in its place.
        for attempt in range(100):
            (folder / "run/metrics.jsonl").rename(folder / f"moved_{attempt}")
            with contextlib.suppress(FileExistsError):
                (folder / "run/metrics.jsonl").mkdir()
                return
        raise AssertionError("metrics.jsonl came back a hundred times")

    code, said = train(folder / "run", at={3: replace})
    assert code == 0, said
    one_line(said, "some metrics are not written")
    same(folder / "run", metrics=False)


def events_deleted(folder):
    def delete():
        for path in (folder / "run").glob("events.*"):
            path.unlink()

    code, said = train(folder / "run", at={3: delete})
    assert code == 0 and len(list((folder / "run").glob("events.*"))) == 1, said
    same(folder / "run")


def left_by_a_dead_process(folder):
    checkpoints = folder / "run/checkpoints"
    code, said = train(folder / "run", at={3: kill(signal.SIGTERM)})
    assert code == 75, said
    (checkpoints / "5.orbax-checkpoint-tmp-12/state").mkdir(parents=True)
    (checkpoints / "5.orbax-checkpoint-tmp-12/state/junk").write_text("x")
    goes_on(folder / "run", 3)
    assert not [path.name for path in checkpoints.iterdir() if "tmp" in path.name]


def an_empty_checkpoint(folder):
    code, said = train(folder / "run", at={3: kill(signal.SIGTERM)})
    (folder / "run/checkpoints/5").mkdir()
    code, said = train(folder / "run")
    assert code == 2
    one_line(said, f"the newest whole one before it is {folder}/run/checkpoints/3")
    code, said = train(folder / "run", "--config.checkpoint.on_damage=previous")
    assert code == 0, said
    same(folder / "run")


def two_at_the_same_time(folder):
    seen = []

    def another():
        with jax.transfer_guard("allow"):
            seen.append(train(folder / "run"))

    code, said = train(folder / "run", at={3: another})
    assert code == 0, said
    assert seen[0][0] == 2
    one_line(seen[0][1], f"another process trains in {folder}/run")
    same(folder / "run")


# --- Time and processes


def a_clock_that_jumps(folder):
    now = time.time
    with pytest.MonkeyPatch.context() as patch:

        def jump():
            patch.setattr(time, "time", lambda: now() - 86400)

        code, said = train(folder / "run", at={3: jump})
    assert code == 0, said
    same(folder / "run")


def a_process_that_is_stopped(folder):
    def stop():
        pid = os.getpid()
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {pid}"])
        os.kill(pid, signal.SIGSTOP)

    code, said = train(folder / "run", at={3: stop})
    assert code == 0, said
    same(folder / "run")


@contextlib.contextmanager
def training_with_a_worker(folder):
    """A run in a process of its own, as grain cannot pickle functions that these tests wrap."""
    metrics = folder / "run/metrics.jsonl"
    options = ("--config.data.batches.cache=False", "--config.data.batches.num_workers=1")
    length = ("--config.train.num_steps=100000", "--config.checkpoint.every=50000")
    process = start(*COMMAND, f"--workdir={folder / 'run'}", *options, *length, devices=1)
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        threads = Path(f"/proc/{process.pid}/task").iterdir()
        children = [c for thread in threads for c in (thread / "children").read_text().split()]
        workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert workers
        yield process, workers
    finally:
        process.kill()


def a_worker_that_is_killed(folder):
    with training_with_a_worker(folder) as (process, workers):
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 2, said
    one_line(said, "error: cannot read the batch of step", "has died: it was killed or ran out")
    assert saved_steps(folder / "run/checkpoints")


def is_running(pid):
    """Whether a process still has a command line, which one that only awaits its parent has not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def a_run_that_is_killed_beside_its_worker(folder):
    with training_with_a_worker(folder) as (process, workers):
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, f"{workers} outlive their run"
            time.sleep(0.2)


test_what_raises_or_hangs = faults(
    [
        Fault("data that raise once", data_that_raise),
        Fault("a hook that raises", a_hook_that_raises),
        Fault("validation that raises", validation_that_raises),
        Fault("data that hang", data_that_hang),
        Fault("a loss that is NaN", a_loss_that_is_nan),
    ]
)
test_signals = faults(
    [
        Fault("several signals at once", many_signals),
        Fault("signals in the last save", a_signal_while_the_last_save_is_written),
        Fault("Ctrl-C in the final test", a_signal_in_the_test),
    ]
)
test_folders_and_disks = faults(
    [
        Fault("checkpoints deleted", checkpoints_deleted),
        Fault("checkpoints replaced by a file", checkpoints_replaced_by_a_file),
        Fault("a disk read-only for a while", a_disk_that_is_read_only_for_a_while),
        Fault("a full disk for one save", a_full_disk_for_one_save),
        Fault("a full disk until the end", a_full_disk_until_the_end),
        Fault("a disk unmounted", a_disk_that_is_unmounted),
        Fault("metrics.jsonl deleted", metrics_deleted),
        Fault("metrics.jsonl replaced by a folder", metrics_replaced_by_a_folder),
        Fault("TensorBoard's file deleted", events_deleted),
        Fault("a partial checkpoint of a dead process", left_by_a_dead_process),
        Fault("an empty checkpoint", an_empty_checkpoint),
        Fault("two runs in one folder", two_at_the_same_time),
    ]
)
test_time_and_processes = faults(
    [
        Fault("a clock that jumps", a_clock_that_jumps),
        Fault("SIGSTOP and SIGCONT", a_process_that_is_stopped),
        Fault("a worker of the data killed", a_worker_that_is_killed),
        Fault("SIGKILL beside a data worker", a_run_that_is_killed_beside_its_worker),
    ]
)
