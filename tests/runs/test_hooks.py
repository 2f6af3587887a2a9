"""The hooks of a run: which there are, in which order they act, what the pictures are given."""

import collections
import io

import jax
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment.hooks import bind_hooks
from diffusion_jax.runs import hooks as run_hooks
from diffusion_jax.runs.hooks import Watched, build_hooks
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.loop import Event, Hook
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.writers import Writer

TRAIN, VALID = (
    {"image": np.full((4, 28, 28, 1), value, np.float32), "label": np.zeros(4, np.int32)}
    for value in (0.25, 0.75)
)


@pytest.fixture
def make(tmp_path):
    """make(section of hooks, **what is watched) -> (hooks, pictures drawn, images written)."""
    drawn, written = [], []

    def pictures(frozen, *, class_names, max_images, log_every_t=200):
        def log_images(state, batch):
            drawn.append((max_images, log_every_t, class_names, batch))
            return {"inputs": batch["image"][:max_images]}

        return log_images

    def hooks(asked, **watched):
        experiment = built("configs/mnist.py:tiny")
        experiment = experiment._replace(task=experiment.task._replace(pictures=pictures))
        sections = {"hooks": asked, "checkpoint": {"every": 5}}
        options = bind_hooks(sections, experiment.task, experiment.data.splits)
        everything = Watched(
            workdir=tmp_path,
            writer=Writer(write_images=lambda step, images: written.append((step, [*images]))),
            checkpoints=open_checkpoints(tmp_path / "checkpoints"),
            metadata={},
            scores={},
            frozen={},
            validation_batches=Batches(lambda start: iter([VALID]), 4, 1, ((28, 28),)),
            class_names=("zero",),
            signals=collections.deque(),
            hang=Hook(lambda step: False, hang),
            progress=io.TextIOWrapper(io.BytesIO()),
        )._replace(**watched)
        return build_hooks(experiment._replace(hooks=options), everything)

    return hooks, drawn, written


def hang(event):
    del event


def makers(hooks):
    """The function that made each hook, as far as its name tells."""
    return [hook.act.__qualname__.partition(".")[0] for hook in hooks]


ALL = {
    "validation": {"every": 5},
    "early_stopping": {"monitor": "val/loss", "patience": 3},
    "images": {},
    "profiler": {},
}


def test_they_act_in_the_order_in_which_they_need_each_other(make):
    found = makers(make[0](ALL))
    # A number that is none stops a run before it is shown or saved; scores are there before those
    # who compare them; a signal saves behind validation; saving comes last.
    assert found[0] == "hang" and found[-2:] == ["signal_hook", "checkpoint"]
    names = ["images", "images", "validation", "early_stopping", "signal_hook", "checkpoint"]
    assert [name for name in found if name in names] == names
    assert found.index("profiler") < found.index("images") and len(found) == 11


def test_what_every_run_has_and_what_it_has_only_when_asked(make):
    hooks = make[0]
    assert len(hooks({})) == 6
    assert len(hooks({}, progress=None)) == 5
    assert makers(hooks({"images": {}}, validation_batches=None)).count("images") == 1


def test_pictures_are_of_the_step_and_of_the_first_validation_batch(make):
    hooks, drawn, written = make
    found = hooks({"images": {"batch_frequency": 3, "max_images": 2, "log_every_t": 500}})
    shown = [hook for hook in found if hook.act.__qualname__.startswith("images")]
    assert [[hook.due(step) for hook in shown] for step in (3, 5)] == [[True] * 2, [False] * 2]
    for hook in shown:
        hook.act(Event(3, None, {}, TRAIN, 0.0))
    assert [(n, t, names) for n, t, names, _ in drawn] == [(2, 500, ("zero",))] * 2
    assert [float(batch["image"].max()) for *_, batch in drawn] == [0.25, 0.75]
    assert written == [(3, ["train/inputs"]), (3, ["val/inputs"])]


def test_batches_without_images_get_them_before_they_are_shown(make):
    hooks, drawn, _ = make
    asked = []

    def with_images(batch, count):
        asked.append((sorted(batch), count))
        return TRAIN

    found = hooks({"images": {"batch_frequency": 1}}, with_images=with_images)
    for hook in (hook for hook in found if hook.act.__qualname__.startswith("images")):
        hook.act(Event(1, None, {}, {"moments": np.zeros(4)}, 0.0))
    assert asked == [(["moments"], 4)] and len(drawn) == 2
    jax.tree.map(np.testing.assert_array_equal, drawn[0][-1], TRAIN)


def test_samples_and_levels_are_scored_between_validation_and_those_who_compare(make, monkeypatch):
    asked, scores = [], {}

    def build_score(experiment, frozen, options, folder):
        asked.append((options.metrics, options.num_samples, folder.name))
        return lambda params: {"mind_x": params["w"]}

    def build_evaluate_levels(experiment, frozen, batches, options):
        asked.append(options.num_levels)
        return lambda state: {"levels/00": 1.0}

    monkeypatch.setattr(run_hooks, "build_score", build_score)
    monkeypatch.setattr(run_hooks, "build_evaluate_levels", build_evaluate_levels)
    sections = {
        "metrics": {"every": 5, "metrics": ("mind",), "num_samples": 7},
        "levels": {"every": 5, "num_levels": 3},
    }
    found = make[0](ALL | sections, scores=scores)
    names = ["validation", "levels", "metrics", "early_stopping"]
    assert [name for name in makers(found) if name in names] == names
    assert asked == [3, (("mind",), 7, "statistics")]
    hook = found[makers(found).index("metrics")]
    hook.act(Event(5, TrainState(5, {"w": 0.25}, (), {}), {}, TRAIN, 0.0))
    assert scores[5]["metrics/mind_x"] == 0.25
