"""`python launch.py plan`: memory, FLOPs and time of a config on devices that are not there."""

import argparse
import json
import pathlib

import jax

from diffusion_jax.cli.arguments import load_config
from diffusion_jax.plan import DoesNotFit, find_topology, make_plan, remat_policies, search
from diffusion_jax.plan.report import advice, as_dict, as_text, table


def run(arguments: argparse.Namespace) -> int:
    """Plan a training run, print the plan and write it as JSON; return 0, or 2 if it does not
    fit."""
    if not arguments.config or not arguments.topology:
        raise ValueError(
            "nothing to plan: give --config=CONFIG and --topology=v5p:2x2x1; see --help"
        )
    batch = arguments.per_device_batch
    if batch is not None and batch < 1:
        raise ValueError(f"--per_device_batch={batch} should be at least 1")
    topology = find_topology(arguments.topology)
    config = load_config(arguments.config, arguments.overrides)
    if topology.is_tpu:  # what was compiled for absent devices cannot be read from a cache
        jax.config.update("jax_enable_compilation_cache", False)
    help_ = advice(config, topology, batch)
    if arguments.search:
        found = search(config, topology, remat_policies(config))
        plans = [entry.plan for entry in found if entry.plan is not None]
        texts = [*map(as_text, plans), table(found)]
        fits = bool(plans)
    else:
        try:
            plans = [make_plan(config, topology, batch)]
        except DoesNotFit as error:
            raise ValueError(f"{error}; {help_}") from error
        texts = [as_text(plans[0])]
        fits = plans[0].fits is not False
    print("\n\n".join(texts))
    if arguments.json:
        figures = [as_dict(plan) for plan in plans]
        path = pathlib.Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures if arguments.search else figures[0], indent=2) + "\n")
    if not fits:
        raise ValueError(f"{arguments.config} does not fit {topology.name}; {help_}")
    return 0
