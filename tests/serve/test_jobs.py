"""The queue of calls: its order, its limits, and calls that fail."""

import threading
import time

from diffusion_jax.runs.drawing.samples import Pictures
from diffusion_jax.runs.drawing.watched import Stopped
from diffusion_jax.serve.jobs import MOST_WAITING, Jobs

IMAGES = Pictures([b"first", b"second"], b"both")


def wait_for(job, state):
    deadline = time.monotonic() + 30
    while job.state != state:
        assert time.monotonic() < deadline, (job.state, job.error)
        time.sleep(0.01)


def test_one_at_a_time_in_order_and_no_more_than_the_queue_holds():
    jobs, go, order = Jobs(), threading.Event(), []

    def draw(name):
        def call(on_step):
            order.append(name)
            go.wait(30)
            return IMAGES

        return call

    first = jobs.add(draw(0))
    wait_for(first, "drawing")
    others = [jobs.add(draw(i + 1)) for i in range(MOST_WAITING)]
    assert jobs.add(draw("too many")) is None
    assert jobs.find(others[2].id)[1] == 3 and jobs.find("another") is None
    go.set()
    wait_for(others[-1], "done")
    assert (
        order == list(range(MOST_WAITING + 1)) and len(first.images) == 2 and first.grid == b"both"
    )


def test_old_jobs_are_forgotten():
    jobs = Jobs()
    for _ in range(40):
        last = jobs.add(lambda on_step: IMAGES)
        wait_for(last, "done")
    kept = [key for key in list(jobs._jobs) if jobs.find(key)]
    assert last.id in kept and len(kept) <= 33


def test_a_call_that_fails_leaves_the_queue_working():
    def out_of_memory(on_step):
        raise MemoryError("no more\nof it")

    def wrong(on_step):
        raise ValueError("n = 0 should be at least 1")

    jobs = Jobs()
    first, second = jobs.add(out_of_memory), jobs.add(wrong)
    wait_for(second, "failed")
    assert first.error == "MemoryError: no more" and second.error == "n = 0 should be at least 1"
    wait_for(jobs.add(lambda on_step: IMAGES), "done")


def test_a_job_is_stopped_at_its_next_step():
    jobs, stepped = Jobs(), threading.Event()

    def draw(on_step):
        while on_step(3, 9):
            stepped.set()
            time.sleep(0.01)
        raise Stopped("stopped")

    job = jobs.add(draw)
    assert stepped.wait(30) and (job.done, job.total) == (3, 9)
    job.stop.set()
    wait_for(job, "stopped")
    last = jobs.add(draw)
    wait_for(last, "drawing")
    jobs.close()
    assert last.state == "stopped" and not jobs._worker.is_alive()
