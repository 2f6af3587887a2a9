"""`options`: what a config may hold."""

import argparse

from diffusion_jax.experiment.config.catalogue import listing


def run(arguments: argparse.Namespace) -> int:
    """Print the keys, types, defaults and choices of one section or of all; return 0."""
    print("\n".join(listing(arguments.section)).rstrip())
    if not arguments.section:
        print(
            "\nAdd a section, or section.name, for the options of every name: options sampler.ddim"
        )
    return 0
