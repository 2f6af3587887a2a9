"""Finding checkpoints by what people name, without reading one."""

import json

import numpy as np
import pytest

from diffusion_jax.train.checkpoints.reading import (
    DamagedCheckpoint,
    anywhere,
    few,
    load_params,
    name_of,
    number_of,
    resolve_checkpoint,
    restore_state,
    saved_steps,
)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 4, 12 and 100, one set aside, and what is no checkpoint."""
    folder = tmp_path / "runs" / "2024"
    for step in ("4", "12", "100", "set_aside/200", "12.orbax-checkpoint-tmp-7"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    (folder / "checkpoints" / "7").write_text("a file")
    return folder


def test_steps_are_numbers_in_their_order(run, tmp_path):
    assert saved_steps(run / "checkpoints") == [4, 12, 100]
    assert saved_steps(tmp_path / "nowhere") == []


def test_a_run_its_folder_of_checkpoints_one_of_them_and_a_file_in_it(run):
    inner = run / "checkpoints" / "12" / "state" / "x"
    inner.parent.mkdir()
    inner.write_text("")
    for path, step in (
        (run, 100),
        (run / "checkpoints", 100),
        (run / "checkpoints" / "12", 12),
        (inner, 12),
        (run / "checkpoints" / "set_aside" / "200", 200),
    ):
        assert [str(part) for part in resolve_checkpoint(path)] == [str(run), str(step)]


def test_what_is_not_there_is_named_with_what_is(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*5: it does not exist"):
        resolve_checkpoint(run / "checkpoints" / "5")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in .*empty/checkpoints"):
        (tmp_path / "empty").mkdir()
        resolve_checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="of step 5 in .*; there are 4, 12, 100"):
        load_params(run / "checkpoints", step=5)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*set_aside/7"):
        load_params(run / "checkpoints", step="set_aside/7")


def test_one_that_was_set_aside_has_a_name_where_its_step_means_another(run):
    for name in ("200", "set_aside/12.2"):
        (run / "checkpoints" / name).mkdir()
    for name, step in (("set_aside/200", 200), ("set_aside/12.2", 12)):
        found, step_name = resolve_checkpoint(run / "checkpoints" / name)
        assert (str(found), step_name, number_of(step_name)) == (str(run), name, step)
    assert name_of(run / "checkpoints", 200) == 200
    assert name_of(run / "checkpoints", 300) == 300


def test_a_checkpoint_without_its_description_is_damaged(run):
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/100 is damaged: its description"):
        load_params(run / "checkpoints")
    record = run / "checkpoints" / "100" / "metadata" / "metadata"
    record.parent.mkdir()
    record.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(DamagedCheckpoint) as error:
        restore_state(run / "checkpoints", {"step": np.int32(0)})
    assert "there is no whole one before it" in str(error.value) and error.value.whole is None


def test_long_lists_are_cut():
    assert few("abcd") == "a, b, c, d" and few("abcdefg") == "a, b, c, d and 3 more"


def test_of_one_process_anywhere_is_here():
    assert anywhere(True) is True and anywhere(False) is False
