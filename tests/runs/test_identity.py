"""What a run was made from is told apart: config, code, packages, data, and between processes."""

import hashlib
import json
import os

import ml_collections
import numpy as np
import pytest

from diffusion_jax.runs import identity


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(train=dict(num_steps=8), optimizer=dict(learning_rate=1e-3, b2=0.9), mult=(1, 2))
    )
    made.update_from_flattened_dict(changes)
    return made


def saved(**changes):
    return json.loads(json.dumps(identity.made_from(config(**changes))))


def test_a_description_names_config_code_and_packages():
    found = saved()
    assert found["config"]["optimizer"] == {"learning_rate": 1e-3, "b2": 0.9}
    assert found["revision"] and found["code"] == identity.code_digest()
    assert found["packages"]["jax"] and found["packages"]["orbax-checkpoint"]
    assert identity.made_from(config(), seed=3)["seed"] == 3


def test_a_checkpoint_of_another_config_is_refused_and_what_may_change_is_not():
    assert identity.new_changes(saved(), config(), 4, "run/4") == []
    longer = config(**{"train.num_steps": 16})
    assert identity.new_changes(saved(), longer, 4, "run/4") == []
    other = config(**{"optimizer.learning_rate": 2e-3, "mult": (1,)})
    message = r"run/4 .* differs in mult: \(1, 2\) -> \(1,\); optimizer.learning_rate: 0.001 -> 0.0"
    with pytest.raises(ValueError, match=message):
        identity.new_changes(saved(), other, 4, "run/4")


def test_what_is_named_is_recorded_once():
    other = config(**{"optimizer.learning_rate": 2e-3})
    named = ("optimizer.learning_rate",)
    found = identity.new_changes(saved(), other, 4, "run/4", named=named)
    assert found == [{"step": 4, "path": named[0], "old": 1e-3, "new": 2e-3}]
    again = json.loads(json.dumps(found))
    assert identity.new_changes(saved(), other, 4, "run/4", known=again) == []
    assert identity.new_changes(saved(), other, 4, "run/4", named=named, known=again) == []
    with pytest.raises(ValueError, match="learning_rate: 0.001 -> 0.002"):
        identity.new_changes(saved(), other, 2, "run/2", known=again)  # was changed later
    third = config(**{"optimizer.learning_rate": 3e-3})
    with pytest.raises(ValueError, match="learning_rate: 0.001 -> 0.003"):
        identity.new_changes(saved(), third, 4, "run/4", known=again)


def test_other_code_and_packages_are_listed():
    before, now = saved(), saved()
    assert identity.code_differences(before, now) == []
    before["packages"]["jax"], before["revision"] = "0.1", "abc"
    assert identity.code_differences(before, now) == [
        f"revision abc -> {now['revision']}",
        f"packages.jax 0.1 -> {now['packages']['jax']}",
    ]
    assert identity.code_differences({"revision": now["revision"]}, now) == []  # of before


def test_other_data_are_listed_by_split():
    part = {"num_examples": 3, "class_names": ["a", "b"], "digest": "x"}
    before = {"data": {"train": part, "test": part}}
    now = {"train": {**part, "class_names": ["b", "c"]}, "test": part, "validation": part}
    (line,) = identity.changed_data(before, now)
    assert line.startswith("train: class_names: 2 (was 2), without a; with new c")
    assert identity.changed_data({}, now) == []


@pytest.fixture
def processes(monkeypatch):
    """Pretend to be process 0 of several, whose texts the test gives."""
    texts = []

    def gather(value):
        if value.dtype == np.int32:
            return np.asarray([len(text) for text in texts])
        if len(value) == 32:
            return np.stack([np.frombuffer(hashlib.sha256(t).digest(), np.uint8) for t in texts])
        return np.stack([np.frombuffer(t.ljust(len(value), b"\0"), np.uint8) for t in texts])

    def pretend(*facts):
        texts[:] = [json.dumps(fact, sort_keys=True).encode() for fact in facts]
        identity.agree(facts[0])

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr(identity.multihost_utils, "process_allgather", gather)
    return pretend


def test_processes_agree_or_name_who_differs_in_what(processes):
    facts = {"config.lr": 1e-3, "packages": {"jax": "1"}, "data": {"train": {"digest": "a"}}}
    processes(facts, facts, facts)
    other = {**facts, "config.lr": 2e-3, "config.own": "long" * 99}
    message = 'process 2 has config.lr = 0.002 .process 0: 0.001., config.own = "long'
    with pytest.raises(ValueError, match=message):
        processes(facts, facts, other)
    data = {**facts, "data": {"train": {"digest": "b"}}}
    with pytest.raises(ValueError, match='process 1 has data.train.digest = "b" .process 0: "a"'):
        processes(facts, data, facts)


def test_hosts_may_keep_their_files_in_different_places():
    facts = identity.config_facts(config(**{"train": {"ckpt_path": "/here", "batch_size": 3}}))
    assert facts["config.train.batch_size"] == 3 and "config.train.ckpt_path" not in facts


def test_git_revision_is_one_word():
    assert identity.git_revision() and " " not in identity.git_revision()


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    hanging = tmp_path / "git"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(identity, "_GIT_SECONDS", 0.1)
    assert identity.git_revision() == "unknown"
