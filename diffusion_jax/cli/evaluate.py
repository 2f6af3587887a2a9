"""`python launch.py evaluate`: the losses of a run on a split of its data."""

import argparse
import pathlib

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.weights import run_frozen
from diffusion_jax.runs.evaluation import build_evaluate
from diffusion_jax.runs.folder import load_saved_config
from diffusion_jax.train.checkpoints.saving import restore_state


def run(arguments: argparse.Namespace) -> int:
    """Print every test loss with raw and with EMA weights; return 0."""
    workdir = pathlib.Path(arguments.workdir)
    built = make_experiment(load_saved_config(workdir))
    source = built.data.source(arguments.split)
    batches = built.data.eval_batches(source, batch_size=built.training.batch_size)
    evaluate = build_evaluate(built, run_frozen(built, workdir), batches, prefix=arguments.split)
    state, _ = restore_state(workdir / "checkpoints", built.abstract_state(), arguments.step)
    print(
        f"{workdir}, step {int(state.step)}, {batches.num_examples} records of {arguments.split}:"
    )
    for name, value in sorted(evaluate(state).items()):
        print(f"  {name:32} {value:.6g}")
    return 0
