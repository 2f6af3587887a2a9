"""Folders of runs that were never trained, for what reads them."""

import json
from pathlib import Path

import numpy as np

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.folder import save_config
from diffusion_jax.train.pictures import save_png

TINY = "configs/mnist.py:tiny"


def logged(workdir, rows, *overrides):
    """Make the folder of a run with a config and rows of metrics."""
    save_config(workdir, load_config(TINY, [f"--config.{item}" for item in overrides]))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def odd_rows() -> dict[str, list[dict]]:
    """Rows of runs that went wrong, or have hardly begun."""
    huge = [{"step": i, "time": 1.0, "train/loss": x} for i, x in enumerate((1e308, -1e308, 1e300))]
    levels = {"levels/00_sigma": 0.0, "levels/00": "NaN", "levels/00_ci": "NaN"}
    return {
        "one row": [{"step": 1, "time": 1.0, "train/loss": 2.0}],
        "only NaN": [
            {"step": i, "train/loss": "NaN", "lr": "Infinity", **levels} for i in range(3)
        ],
        "long NaN": [{"step": i, "train/loss": "NaN", "lr": 0.0} for i in range(3000)],
        "huge": huge,
        "the same step": [{"step": 1, "train/loss": 2.0}] * 3,
        "back and forth": [{"step": i, "train/loss": -i} for i in (5, 1, 3, 2)],
        "no time": [{"step": i, "time": "NaN", "train/loss": 0.0} for i in range(3)],
    }


def picture(workdir: Path, name: str, step: int, value: int = 0) -> Path:
    """Write a logged picture of one colour."""
    path = workdir / "images" / f"{name}_gs-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_png(path, np.full((2, 2, 3), value, np.uint8))
