"""`python launch.py --config=...`: train, or continue, a run; then test it."""

import argparse
import pathlib

import jax

from diffusion_jax import run_folder
from diffusion_jax.build import experiment
from diffusion_jax.build.run import build_run
from diffusion_jax.cli.arguments import load_config
from diffusion_jax.train import loop


def run(arguments: argparse.Namespace) -> int:
    """Train until the config's last step, a stop or a signal; return the exit code."""
