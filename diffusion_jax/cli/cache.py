"""`cache`: encode a training split once, before the runs that train from it."""

import argparse
import pathlib

import jax

from diffusion_jax.cli.program import exit_code
from diffusion_jax.devices import processes
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config_files import load_config, override_config
from diffusion_jax.runs.folder import has_run, load_saved_config
from diffusion_jax.runs.latent_cache import load_frozen, make_latent_cache
from diffusion_jax.runs.latent_key import cache_options


def run(arguments: argparse.Namespace) -> int:
    """Make, finish or check the latent cache of a config; return 0."""
    flags = "coordinator_address num_processes process_id local_device_ids".split()
    place = processes.place_of_flags(*(getattr(arguments, flag) for flag in flags))
    with processes.joined(place, exit_code):
        return _cache(arguments)


def _cache(arguments: argparse.Namespace) -> int:
    workdir = None if arguments.workdir is None else pathlib.Path(arguments.workdir)
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    elif workdir is not None and has_run(workdir):
        config = override_config(load_saved_config(workdir), arguments.overrides)
    else:
        raise ValueError(
            "nothing to encode: give --config=CONFIG with --config.latent_cache.folder=FOLDER, or "
            "--workdir=RUN; see --help"
        )
    built = make_experiment(config)
    cache_options(built)  # a config without a cache is not worth loading weights
    source = built.data.source("train")
    cache = make_latent_cache(built, load_frozen(built, workdir), source)
    size = sum(path.stat().st_size for path in cache.shards.folder.iterdir())
    if jax.process_index() == 0:
        print(
            f"{cache.shards.folder} holds {cache.shards.num_records} records in "
            f"{cache.shards.num_shards} shards, {size / 1e6:.1f} MB"
        )
    return 0
