"""A folder of checkpoints goes on after saves that failed: with a manager that fails on request."""

import asyncio
import errno
import gc
import logging

import orbax.checkpoint as ocp
import pytest
from etils import epath

from diffusion_jax.train.checkpoints import folder as module
from diffusion_jax.train.checkpoints.folder import PARTIAL, Folder, SaveFailed, free_bytes

NOTHING = ocp.args.Composite()


class Manager:
    """Orbax's, as far as Folder knows it: an error of the background shows when one waits."""

    def __init__(self):
        self.saved, self.error, self.busy, self.closed = [], None, 0, False

    def save(self, step, *, args, metrics, force):
        self.saved.append(step)
        return True

    def is_saving_in_progress(self):
        self.busy -= 1
        return self.busy >= 0

    def wait_until_finished(self):
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed = True


@pytest.fixture
def made(tmp_path):
    """The folder, and every manager that it has made."""
    managers = []

    def make():
        managers.append(Manager())
        return managers[-1]

    folder = Folder(epath.Path(tmp_path), make)
    yield folder, managers
    folder._quiet.close()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / f"7{PARTIAL}-1").mkdir()
    (tmp_path / f"7{PARTIAL}-1" / "x").write_text("")
    (tmp_path / "6").mkdir()
    Folder(epath.Path(tmp_path), Manager).close()
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_save_is_waited_for(made, monkeypatch):
    folder, (manager,) = made
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
    assert folder.save(3, NOTHING, None) and manager.saved == [3]
    manager.busy = 5
    folder.settle()
    assert manager.busy < 0
    folder.close()
    assert manager.closed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("long [path] [os_error_code='28'] more"), "No space left on device"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_failed_save_is_one_sentence_and_the_next_has_a_new_manager(made, error, reason):
    folder, managers = made
    folder.save(3, NOTHING, None)
    managers[0].error = error
    (folder.directory / f"3{PARTIAL}").mkdir()
    with pytest.raises(SaveFailed) as failed:
        folder.settle()
    said = str(failed.value)
    assert said.startswith(f"cannot save step 3 in {folder.directory}: {reason} (")
    assert said.endswith(" GiB are free)") and "\n" not in said
    assert len(managers) == 2 and not list(folder.directory.iterdir())
    assert folder.save(4, NOTHING, None) and managers[1].saved == [4]
    folder.settle()
    folder.close()


def test_the_last_save_tells_its_failure_when_the_folder_is_closed(made):
    folder, (manager,) = made
    folder.save(9, NOTHING, None)
    manager.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(SaveFailed, match="cannot save step 9 .* Input/output error"):
        folder.close()


def test_waiting_has_an_end(made, monkeypatch):
    folder, managers = made
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.01)
    managers[0].busy = 10**9
    folder.save(1, NOTHING, None)
    with pytest.raises(SaveFailed, match="it did not end within"):
        folder.settle()


def test_stacks_that_are_told_here_are_not_logged_again(made):
    folder, _ = made
    record = lambda path, **more: logging.LogRecord("absl", 40, path, 1, "no", (), **more)
    told = ("E", ValueError(), None)
    logger = logging.getLogger("absl")
    assert not logger.filter(record("/x/orbax/save.py", exc_info=told))
    assert logger.filter(record("/x/other.py", exc_info=told))
    assert logger.filter(record("/x/orbax/save.py", exc_info=None))
    folder.close()
    assert logger.filter(record("/x/orbax/save.py", exc_info=told))


def test_errors_of_a_save_that_asyncio_collects_late_are_not_logged(made, caplog):
    made[0].close()

    def failing(filename):
        scope = {}
        exec(compile("async def fail():\n    raise ValueError(7)", filename, "exec"), scope)
        return scope["fail"]

    async def nobody_asks(fail):
        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        assert task.done()

    asyncio.run(nobody_asks(failing("/x/orbax/checkpoint/serialization.py")))
    gc.collect()
    assert not caplog.records
    asyncio.run(nobody_asks(failing("/x/other.py")))
    gc.collect()
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        "Task exception was never retrieved"
    ]


@pytest.mark.parametrize(
    ("path", "logged"),
    [("/runs/a/7.orbax-checkpoint-tmp/state/d/1", 0), ("/runs/a/checkpoints/7/state/d/1", 1)],
)
def test_errors_of_tensorstore_that_come_without_a_stack_are_not_logged(made, caplog, path, logged):
    made[0].close()

    async def nobody_asks():
        # As TensorStore does where several writes fail at once: Orbax asks for the first one only.
        asyncio.get_running_loop().create_future().set_exception(ValueError(f"writing {path}"))

    asyncio.run(nobody_asks())
    gc.collect()
    assert len(caplog.records) == logged


def test_free_space_is_known_where_the_folder_is(tmp_path):
    assert free_bytes(epath.Path(tmp_path)) > 0
    assert free_bytes(epath.Path(tmp_path) / "nowhere") is None
