"""`cache`: encode a training split once, before the runs that train from it."""

import argparse
import pathlib

import jax

from diffusion_jax.experiment.config.files import load_config, override_config
from diffusion_jax.runs.folder import has_run, load_saved_config
from diffusion_jax.runs.latent_cache import encode_split
from diffusion_jax.wording import counted


def run(arguments: argparse.Namespace) -> int:
    """Make, finish or check the latent cache of a config; return 0."""
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
    cache = encode_split(config, workdir)
    size = sum(path.stat().st_size for path in cache.shards.folder.iterdir())
    if jax.process_index() == 0:
        print(
            f"{cache.shards.folder} holds "
            f"{counted(cache.shards.num_records, 'record', 'records')} in "
            f"{counted(cache.shards.num_shards, 'shard', 'shards')}, {size / 1e6:.1f} MB"
        )
    return 0
