"""`describe`: what a released file or folder is, and which config describes it."""

import argparse

from diffusion_jax.runs.files.released import describe_file


def run(arguments: argparse.Namespace) -> int:
    """Print what the file is; return 0."""
    if not arguments.file:
        raise ValueError("describe what? give a file or folder: describe FILE")
    print("\n".join(describe_file(arguments.file)))
    return 0
