"""Where a run begins: in an empty folder, at one of its checkpoints, or at one of another run."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import PREFIX, override_config
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runs import folder, identity
from diffusion_jax.runs.comparison import with_whole_paths
from diffusion_jax.train.checkpoints.reading import (
    DamagedCheckpoint,
    load_metadata,
    name_of,
    resolve_checkpoint,
    saved_steps,
)


class Start(NamedTuple):
    """What is asked of a run, and the checkpoint that it goes on from.

    home: the run whose frozen networks are read, workdir but for a fork. named: paths of the config
    that are changed on purpose. directory, step: the checkpoint that is read, step "set_aside/20"
    for one that was set aside; None, 0 for a new run. metadata: what was saved beside it, None when
    it is damaged. record: what the folder of the run says.
    """

    workdir: pathlib.Path
    home: pathlib.Path
    config: ml_collections.ConfigDict
    named: tuple[str, ...]
    directory: pathlib.Path | None
    step: int | str
    is_fork: bool
    metadata: Mapping[str, Any] | None
    record: folder.Record | None

    @property
    def forked_from(self) -> str | None:
        """The checkpoint of another run that this one began from."""
        if self.is_fork:
            return self.where
        return None if self.record is None else self.record.forked_from

    @property
    def where(self) -> str:
        """The checkpoint, for messages."""
        return f"{self.directory}/{self.step}"

    def check(self) -> None:
        """Compare the config with the one of the checkpoint; ValueError for what is not named."""
        if self.metadata is not None:
            step = self.metadata["next_batch"] if "next_batch" in self.metadata else 0
            self.changes(self.metadata, step)

    def changes(self, metadata: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
        """List all that was changed on purpose, until now; ValueError for other differences."""
        known = [] if self.record is None else list(self.record.changes)
        return known + identity.new_changes(
            metadata, self.config, step, self.where, named=self.named, known=known
        )

    def with_data(self, experiment: Experiment) -> Experiment:
        """Read what was prepared of a folder of images that has moved."""
        return with_saved_data(experiment, self.metadata)

    def check_data(self, found: Mapping[str, Any], accept: bool) -> None:
        """Compare the content of the data with the checkpoint's; ValueError when it differs."""
        lines = [] if self.metadata is None else identity.changed_data(self.metadata, found)
        if lines and not accept:
            raise ValueError(
                f"the data changed since the checkpoint {self.where}: {'; '.join(lines)}; "
                "--accept_data_change goes on with them"
            )


def plan_start(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    resume: bool | int | str,
    change: Sequence[str] | Mapping[str, Any],
    fork: str | os.PathLike | None,
) -> Start:
    """Find where training starts, see train_run; nothing is written.

    Raises ValueError or FileNotFoundError for what does not fit together, and in all processes when
    they were asked for different things.
    """
    if not isinstance(change, Mapping):
        change = [f"{PREFIX}{text}" for text in change]
    config = override_config(with_whole_paths(config), change)
    named = tuple(text.removeprefix(PREFIX).partition("=")[0] for text in change)
    if resume is False and folder.has_run(workdir):
        raise ValueError(f"resume = False, but {workdir} holds a run; choose another folder")
    record = folder.find_record(workdir)[0]
    if fork is not None and _began_from(record, fork):
        fork = None  # the same command goes on
    home = workdir
    step = resume if not isinstance(resume, bool) else None
    if fork is not None:
        if folder.has_run(workdir):
            raise ValueError(f"{workdir} holds a run; choose a new folder for the fork of {fork}")
        found, step = resolve_checkpoint(fork)
        home = pathlib.Path(found)
    directory = home / "checkpoints"
    steps = saved_steps(directory)
    step = steps[-1] if step is None and steps else step
    step = name_of(directory, step) if isinstance(step, int) else step
    facts = {**identity.config_facts(config), **identity.code_facts()}
    identity.agree(facts | {"the step to go on from": step})
    if step is None:
        return Start(workdir, home, config, named, None, 0, False, None, record)
    metadata = _peek(directory, step)
    return Start(workdir, home, config, named, directory, step, fork is not None, metadata, record)


def _began_from(record: folder.Record | None, fork: str | os.PathLike) -> bool:
    if record is None or record.forked_from is None:
        return False
    given, known = pathlib.Path(fork).absolute(), pathlib.Path(record.forked_from)
    return given == known or given in known.parents


def _peek(directory: pathlib.Path, step: int | str | None) -> Mapping[str, Any] | None:
    """Read the metadata of a checkpoint; None when it is damaged, which restoring it will tell."""
    try:
        return load_metadata(directory, step=step)
    except DamagedCheckpoint:
        return None


def open_run(
    workdir: pathlib.Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    step: int | None = None,
) -> tuple[Experiment, Mapping[str, Any]]:
    """Build the experiment of a run that was trained -> (experiment, metadata of its checkpoint).

    overrides: of what does not change its model, see folder.load_run_config. The metadata are empty
    when there is no such checkpoint or it is damaged.
    """
    experiment = make_experiment(folder.load_run_config(workdir, overrides))
    metadata = known_of(workdir, step)
    return with_saved_data(experiment, metadata), metadata


def known_of(workdir: pathlib.Path, step: int | None = None) -> Mapping[str, Any]:
    """Read the metadata of a run's checkpoint, the newest when step is None.

    They are empty when there is no such checkpoint or it is damaged.
    """
    steps = saved_steps(workdir / "checkpoints")
    step = steps[-1] if step is None and steps else step
    return (_peek(workdir / "checkpoints", step) if step in steps else None) or {}


def with_saved_data(experiment: Experiment, metadata: Mapping[str, Any] | None) -> Experiment:
    """Read what was prepared of a folder of images that has moved, if a checkpoint knows it."""
    if not metadata or "data" not in metadata:
        return experiment
    content = metadata["data"]["train"]["digest"]
    data = experiment.data.without_folder(content)
    return experiment._replace(setting=experiment.setting._replace(data=data))
