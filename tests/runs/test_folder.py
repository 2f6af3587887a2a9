"""A run folder: its name, its saved config, and its refusal to be taken over."""

import os

import ml_collections
import pytest

from diffusion_jax.experiment.config_files import load_config_file
from diffusion_jax.runs import folder as run_folder


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(
            seed=0,
            train=dict(num_steps=10, batch_size=8),
            model=dict(name="unet", channel_mult=(1, 2), num_classes=None),
            hooks=dict(scalars=dict(every=5)),
        )
    )
    made.update_from_flattened_dict(changes)
    return made


def test_names_follow_latent_diffusion():
    folder = run_folder.new_run_folder("logs", "configs/mnist.py:tiny", postfix="_a")
    assert folder.parent.name == "logs"
    assert folder.name.endswith("_mnist-tiny_a")
    named = run_folder.new_run_folder("logs", "configs/mnist.py", name="first")
    assert named.name.endswith("_first")


def test_saved_config_is_the_config(workdir):
    original = config()
    original.train.twice = original.train.get_ref("num_steps") * 2
    path = run_folder.save_config(workdir, original)
    loaded = load_config_file(path)
    assert loaded.to_dict() == original.to_dict()
    assert loaded.model.channel_mult == (1, 2) and loaded.train.twice == 20


def test_claim_takes_new_folders_and_recognises_its_own(workdir):
    for changes in ({}, {}, {"train.num_steps": 20}):
        with run_folder.claim(workdir, config(**changes)):
            pass
    assert run_folder.load_saved_config(workdir).train.num_steps == 20


def test_two_runs_cannot_share_a_folder(workdir):
    with run_folder.claim(workdir, config()):
        with pytest.raises(ValueError, match="another process trains in"):
            with run_folder.claim(workdir, config()):
                pass
    with run_folder.claim(workdir, config()):
        pass


def test_jobs_that_start_together_get_their_own_folders(tmp_path):
    names = set()
    for _ in range(3):
        folder = run_folder.new_run_folder(str(tmp_path), "configs/mnist.py")
        folder.mkdir()
        names.add(folder.name)
    assert len(names) == 3


def test_check_refuses_another_config_and_changes_nothing(workdir):
    with run_folder.claim(workdir, config()):
        pass
    other = config(**{"model.channel_mult": (1,)})
    message = r"belongs to another config.*model\.channel_mult: \(1, 2\) -> \(1,\)"
    with pytest.raises(ValueError, match=message):
        run_folder.check(workdir, other)
    assert run_folder.load_saved_config(workdir).model.channel_mult == (1, 2)


def test_check_refuses_a_folder_with_other_files(workdir):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="exists and is not the folder of a run"):
        run_folder.check(workdir, config())
    assert [path.name for path in workdir.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_cut_short_can_be_repeated(workdir):
    (workdir / "configs").mkdir(parents=True)
    (workdir / "configs" / "config.tmp").write_text("half a")
    with run_folder.claim(workdir, config()):
        pass
    assert run_folder.has_run(workdir)


def test_missing_run_is_named(workdir):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        run_folder.load_saved_config(workdir)
    with pytest.raises(FileNotFoundError, match="config file .* does not exist"):
        load_config_file(workdir / "x.py")


def test_git_revision_is_one_word():
    assert run_folder.git_revision() and " " not in run_folder.git_revision()


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    hanging = tmp_path / "git"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(run_folder, "_GIT_SECONDS", 0.1)
    assert run_folder.git_revision() == "unknown"
