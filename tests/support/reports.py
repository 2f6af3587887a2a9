"""Folders of runs that were never trained, for what reads them."""

import json
from pathlib import Path

import numpy as np

from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.runs.folder import save_config
from diffusion_jax.train.pictures import save_png

TINY = "configs/mnist.py:tiny"


def logged(workdir, rows, *overrides):
    """Make the folder of a run with a config and rows of metrics."""
    save_config(workdir, load_config(TINY, [f"--config.{item}" for item in overrides]))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def picture(workdir: Path, name: str, step: int, value: int = 0) -> Path:
    """Write a logged picture of one colour."""
    path = workdir / "images" / f"{name}_gs-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_png(path, np.full((2, 2, 3), value, np.uint8))
