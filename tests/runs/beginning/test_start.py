"""Where a run begins is found before anything is written, and what does not fit is told."""

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runs import folder, identity
from diffusion_jax.runs.beginning.start import open_run, plan_start, with_saved_data
from diffusion_jax.train.checkpoints.saving import open_checkpoints, set_aside_later


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(
            train=dict(num_steps=8),
            optimizer=dict(learning_rate=1e-3),
            latent_cache=dict(folder="x"),
        )
    )
    made.update_from_flattened_dict(changes)
    return made


def save(workdir, *steps, made=None, **more):
    checkpoints = open_checkpoints(workdir / "checkpoints", keep_last=9)
    for step in steps:
        metadata = identity.made_from(made or config(), next_batch=step, scores={}, **more)
        checkpoints.save(step, {"a": np.zeros(2)}, metadata)
    checkpoints.close()


@pytest.fixture
def run(workdir):
    folder.save_config(workdir, config())
    save(workdir, 2, 4, 6)
    return workdir


def plan(workdir, made=None, *, resume=True, change=(), fork=None):
    return plan_start(made or config(), workdir, resume, change, fork)


def test_a_new_run_has_no_checkpoint_and_whole_paths(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(workdir)
    assert (found.directory, found.metadata, found.forked_from) == (None, None, None)
    assert found.config.latent_cache.folder == str(tmp_path / "x")
    found.check()
    found.check_data({}, accept=False)


def test_a_run_goes_on_from_the_newest_or_the_one_that_is_named(run):
    assert plan(run).where == f"{run}/checkpoints/6"
    found = plan(run, resume=4)
    assert (found.step, found.metadata["next_batch"], found.home) == (4, 4, run)
    set_aside_later(run / "checkpoints", 2)
    assert plan(run, resume=4).metadata["next_batch"] == 4
    with pytest.raises(ValueError, match="resume = False, but .* holds a run"):
        plan(run, resume=False)


def test_an_edited_config_or_a_checkpoint_of_another_run_is_told(run):
    edited = config(**{"optimizer.learning_rate": 5e-3})
    folder.save_config(run, edited)
    with pytest.raises(ValueError, match="checkpoints/6 was made with .*rate: 0.001 -> 0.005"):
        plan(run, edited).check()
    folder.save_config(run, config())
    save(run, 8, made=edited)
    with pytest.raises(ValueError, match="checkpoints/8 was made with .*rate: 0.005 -> 0.001"):
        plan(run).check()


@pytest.mark.parametrize(
    "change", [["optimizer.learning_rate=1e-4"], {"optimizer.learning_rate": 1e-4}]
)
def test_a_change_is_applied_and_recorded_with_its_step(run, change):
    found = plan(run, resume=4, change=change)
    found.check()
    assert found.config.optimizer.learning_rate == 1e-4
    (made,) = found.changes(found.metadata, 4)
    assert made == {"step": 4, "path": "optimizer.learning_rate", "old": 1e-3, "new": 1e-4}
    folder.save_config(run, found.config, [made])
    again = plan(run, folder.load_saved_config(run), resume=4)  # killed before it saved
    assert again.changes(again.metadata, 4) == [made]
    with pytest.raises(ValueError, match="checkpoints/6 was made with another config"):
        plan(run, folder.load_saved_config(run)).check()
    back = plan(run, folder.load_saved_config(run), change={"optimizer.learning_rate": 1e-3})
    folder.check(run, back.config, back.named)
    back.check()


def test_a_fork_begins_from_a_checkpoint_and_needs_the_other_run_only_once(run, tmp_path):
    new = tmp_path / "new"
    found = plan(new, fork=run / "checkpoints" / "4", change=["optimizer.learning_rate=1e-4"])
    assert (found.workdir, found.home, found.step, found.is_fork) == (new, run, 4, True)
    assert (
        found.forked_from == f"{run}/checkpoints/4" and len(found.changes(found.metadata, 4)) == 1
    )
    with pytest.raises(ValueError, match="was made with another config"):
        plan(new, config(**{"optimizer.learning_rate": 5e-3}), fork=run).check()
    save(new, 4, made=found.config, forked_from=found.forked_from, changes=[])
    run.rename(tmp_path / "gone")
    for source in (run, run / "checkpoints" / "4"):
        again = plan(new, found.config, fork=source)
        assert (again.home, again.is_fork, again.forked_from) == (new, False, found.forked_from)
        again.check()
    with pytest.raises(ValueError, match="new holds a run; choose a new folder for the fork of"):
        plan(new, fork=tmp_path / "gone")


def test_other_data_stop_unless_they_are_accepted(run):
    part = {"num_examples": 3, "class_names": [], "digest": "x"}
    save(run, 8, data={"train": part})
    found = plan(run)
    found.check_data({"train": part}, accept=False)
    now = {"train": {**part, "num_examples": 4}}
    with pytest.raises(
        ValueError, match="checkpoints/8: train: num_examples = 4 was 3; --accept_d"
    ):
        found.check_data(now, accept=False)
    found.check_data(now, accept=True)


def test_a_folder_of_images_that_has_moved_is_read_from_what_was_prepared(tmp_path):
    pictures = tmp_path / "pictures"
    for name, value in (("a", 0), ("b", 255)):
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (28, 28), (value,) * 3).save(pictures / name / "0.png")
    source = {"name": "image_folder", "folder": str(pictures), "data_dir": str(tmp_path / "data")}
    made = load_config("configs/mnist.py:tiny")
    made.data.source = source
    made.data.splits = dict(train="train", validation=None, test=None)
    made.data.batches.channels = 3
    del made.hooks["validation"], made.hooks["images"]
    made.checkpoint.keep_best = 0
    experiment: Experiment = _built(made)
    known = {"data": identity.fingerprints(experiment.data)}
    pictures.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        experiment.data.source("train")
    found = with_saved_data(experiment, known)
    assert identity.fingerprints(found.data) == known["data"]
    assert found.data.class_names(found.data.source("train")) == ("a", "b")
    other = {"data": {"train": {**known["data"]["train"], "digest": "another"}}}
    with pytest.raises(FileNotFoundError):
        with_saved_data(experiment, other).data.source("train")
    # In a new place they are the same data.
    made.data.source.folder = str(tmp_path / "moved")
    assert identity.fingerprints(_built(made).data) == known["data"]


def _built(made):
    from diffusion_jax.experiment import make_experiment

    return make_experiment(made, devices=jax.devices()[:1])


def test_an_opened_run_knows_the_metadata_of_its_checkpoint(workdir):
    made = load_config("configs/mnist.py:tiny")
    folder.save_config(workdir, made)
    save(workdir, 2, 4, made=made, class_names=["one", "two"])
    experiment, metadata = open_run(workdir, {"sampler.num_steps": 3}, 2)
    assert experiment.drawing.num_steps == 3
    assert (metadata["next_batch"], metadata["class_names"]) == (2, ["one", "two"])
    assert open_run(workdir, (), 3)[1] == {}
