"""`evaluate`: the losses of a run on a split of its data."""

import argparse

from diffusion_jax.runs.evaluation import evaluate_run


def run(arguments: argparse.Namespace) -> int:
    """Print every loss with raw and with EMA weights, and bits per dimension; return 0."""
    found = evaluate_run(
        arguments.workdir, arguments.split, step=arguments.step, overrides=arguments.overrides
    )
    records = f"{found.num_examples} records of {arguments.split}"
    print(f"{arguments.workdir}, step {found.step}, {records}:")
    for name, value in sorted(found.losses.items()):
        print(f"  {name:32} {value:.6g}")
    if found.bits is not None:
        count = min(found.bits_images, found.num_examples)
        name = f"{arguments.split}/bits_per_dim"
        print(f"  {name:32} {found.bits:.4f}, at most, over the first {count} images")
    return 0
