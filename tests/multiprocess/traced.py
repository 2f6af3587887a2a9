"""launch.py, which also writes down what the training step saw of every sample.

    TRACE=folder python tests/multiprocess/traced.py --config=... --workdir=...

Process p writes folder/ids_{p}.npy, the records in its rows, [steps, rows]; process 0 also
folder/steps.npz: "x_start", "noise" and "t" of every sample of the global batches, as the jitted
step used them, and "loss".
"""

import functools
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from diffusion_jax.cli import main
from diffusion_jax.diffusion import losses
from diffusion_jax.train import loop

TRACED = "x_start noise t".split()
ddpm_loss, train = losses.ddpm_loss, loop.train
training: list[bool] = []  # filled while the training step is called, and so while it is traced


@functools.wraps(ddpm_loss)  # the config is bound to its signature
def traced_loss(schedule: Any, output: Any, x_start: Any, x_t: Any, t: Any, noise: Any, **options):
    loss, metrics = ddpm_loss(schedule, output, x_start, x_t, t, noise, **options)
    if not training:
        return loss, metrics
    return loss, {**metrics, "trace/x_start": x_start, "trace/noise": noise, "trace/t": t}


def traced_train(state: Any, train_step: Any, batches: Any, hooks: Any, **options: Any) -> Any:
    rows: list[dict[str, np.ndarray]] = []
    ids: list[np.ndarray] = []

    def step(state: Any, batch: Any) -> Any:
        training.append(True)
        state, metrics = train_step(state, batch)
        training.clear()
        trace = {name: metrics.pop(f"trace/{name}") for name in TRACED}
        rows.append(jax.device_get({**trace, "loss": metrics["loss"]}))
        ids.append(batch["index"])
        return state, metrics

    result = train(state, step, batches, hooks, **options)
    folder = pathlib.Path(os.environ["TRACE"])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"ids_{jax.process_index()}.npy", np.stack(ids))
    if jax.process_index() == 0:
        whole: Any = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        np.savez(folder / "steps.npz", **whole)
    return result


if __name__ == "__main__":
    losses.ddpm_loss, loop.train = traced_loss, traced_train
    sys.exit(main(sys.argv[1:]))
