"""Metrics and pictures for Weights & Biases, which is imported only when a run asks for it."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.train.pictures import image_grid
from diffusion_jax.train.writers import Writer

_ID = "wandb_id.txt"


def wandb_writer(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    project: str,
    entity: str | None = None,
    name: str | None = None,
    mode: str = "online",
) -> Writer:
    """Send scalars and pictures to a Weights & Biases run; one that goes on stays the same run.

    Process 0 sends, the others get a writer that does nothing.

    Args:
        workdir: folder of the run; wandb keeps its files there.
        config: values by path, which wandb shows beside the curves.
        project: of wandb.
        entity: user or team, wandb's default if None.
        name: of the run, the name of its folder if None.
        mode: online, offline (`wandb sync` sends it later) or disabled.

    Raises ImportError when wandb is not installed, ValueError for another mode.
    """
    check_choice("mode", mode, ("online", "offline", "disabled"))
    if jax.process_index() != 0:
        return Writer()
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("config.hooks.wandb needs wandb: pip install wandb") from error
    workdir = pathlib.Path(workdir)
    run = wandb.init(
        project=project,
        entity=entity,
        name=workdir.absolute().name if name is None else name,
        mode=mode,
        dir=str(workdir),
        config=dict(config),
        id=_known_id(workdir),
        resume="allow",
    )
    (workdir / _ID).write_text(f"{run.id}\n")
    # wandb's own steps may not go back, and a resumed run goes back to its checkpoint.
    run.define_metric("*", step_metric="step")

    def write_scalars(step: int, scalars: Mapping[str, Any]) -> None:
        run.log({"step": step, **{name: float(value) for name, value in scalars.items()}})

    def write_images(step: int, images: Mapping[str, np.ndarray]) -> None:
        grids = {n: image_grid(np.asarray(b)) for n, b in images.items() if np.ndim(b) == 4}
        if grids:
            run.log({"step": step, **{name: wandb.Image(grid) for name, grid in grids.items()}})

    return Writer(write_scalars=write_scalars, write_images=write_images, close=run.finish)


def _known_id(workdir: pathlib.Path) -> str | None:
    path = workdir / _ID
    return path.read_text().strip() or None if path.is_file() else None
