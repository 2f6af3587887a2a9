"""The run that `train` is about comes from --config or --resume; see test_train.py."""

import pytest
from support.reports import TINY, logged

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.runs.beginning.choosing import Wanted, choose_run
from diffusion_jax.runs.command_line import fields_of


def chosen(*flags):
    return choose_run(fields_of(Wanted, parse_arguments(["train", *flags])))


def test_a_config_brings_no_step_and_the_seed_of_the_flag_wins(tmp_path):
    run = chosen(f"--config={TINY}", f"--workdir={tmp_path}", "--seed=9")
    assert (run.workdir, run.config.seed, run.step) == (tmp_path, 9, None)
    assert run.file is not None and run.file.path == TINY
    assert run.file.config is not None and run.file.config.seed == 0


def test_a_fork_begins_in_its_own_folder_from_the_config_of_the_other(tmp_path):
    source = logged(tmp_path / "a", [], "seed=4")
    (source / "checkpoints" / "8").mkdir(parents=True)
    run = chosen(f"--resume={source}", f"--fork={tmp_path / 'b'}")
    assert (run.workdir, run.config.seed, run.step) == (tmp_path / "b", 4, 8)
    assert run.file is None


def test_a_fork_needs_what_it_begins_from():
    with pytest.raises(ValueError, match="--fork=b needs --resume=RUN"):
        chosen("--fork=b")
