"""The queue of the playground: one call of the model at a time, in the order they were asked."""

import collections
import contextlib
import queue
import secrets
import threading
from collections.abc import Callable
from typing import Any, final

from diffusion_jax.runs.drawing.samples import Pictures
from diffusion_jax.runs.drawing.watched import OnStep, Stopped

MOST_WAITING = 16
_LOOK = 0.5  # seconds after which the thread looks whether all ends
_PATIENCE = 10.0  # seconds that a job may take to stop
_MOST_KEPT = 32  # jobs whose images are kept


@final
class Job:
    """One call: state is waiting, drawing, done, failed or stopped; `error` is a sentence."""

    def __init__(self, draw: Callable[[OnStep], Pictures]) -> None:
        """Keep what draws; nothing is computed yet."""
        self.id = secrets.token_urlsafe(12)
        self.state, self.error, self.done, self.total = "waiting", "", 0, 0
        self.images: list[bytes] = []
        self.grid = b""
        self.stop = threading.Event()
        self._draw = draw

    def run(self) -> None:
        """Draw, and keep the pictures."""
        if self.stop.is_set():
            self.state = "stopped"
            return
        self.state = "drawing"
        try:
            self.images, self.grid = self._draw(self._on_step)
            self.state = "done"
        except Stopped:
            self.state = "stopped"
        except (ValueError, TypeError, OSError) as error:
            self.state, self.error = "failed", str(error)
        except (RuntimeError, MemoryError) as error:  # of a device, say, which is out of memory
            self.state = "failed"
            self.error = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"

    def _on_step(self, done: int, total: int) -> bool:
        self.done, self.total = done, total
        return not self.stop.is_set()

    def report(self, waiting: int) -> dict[str, Any]:
        """Say how far it is; waiting: how many jobs come first."""
        return {
            "id": self.id, "state": self.state, "error": self.error, "done": self.done,
            "total": self.total, "images": len(self.images), "before": waiting,
        }  # fmt: skip


@final
class Jobs:
    """All jobs that are kept, and the thread that works on them."""

    def __init__(self) -> None:
        """Start the thread."""
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._queue: queue.Queue[Job] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._work, name="playground", daemon=True)
        self._worker.start()

    def add(self, draw: Callable[[OnStep], Pictures]) -> Job | None:
        """Put a call at the end of the queue; None when that is full."""
        job = Job(draw)
        with self._lock:
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                return None
            self._jobs[job.id] = job
            finished = [key for key, old in self._jobs.items() if old.state not in _UNFINISHED]
            for key in finished[: max(0, len(self._jobs) - _MOST_KEPT)]:
                del self._jobs[key]
        return job

    def find(self, job_id: str) -> tuple[Job, int] | None:
        """Find a job, and how many come before it."""
        with self._lock:
            if job_id not in self._jobs:
                return None
            before = 0
            for key, job in self._jobs.items():
                if key == job_id:
                    return job, before
                before += job.state in _UNFINISHED
        return None

    def close(self) -> None:
        """Stop all jobs and the thread, so that the process can end.

        A job that stops in none of its steps, because it compiles, is waited for only a while.
        """
        self._closing.set()
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()
        self._worker.join(_PATIENCE)

    def _work(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=_LOOK).run()


_UNFINISHED = ("waiting", "drawing")
