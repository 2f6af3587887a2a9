"""`plan`: memory, FLOPs and time of a config on devices that are not there."""

import argparse
import json
import pathlib
from typing import Any

import jax

from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.plan import (
    DoesNotFit,
    find_batches,
    find_topology,
    make_plan,
    remat_policies,
)
from diffusion_jax.plan.report import advice, as_dict, as_text, table


def run(arguments: argparse.Namespace) -> int:
    """Plan a training run, print the plan, write it as JSON; return 0, or 2 if it does not fit."""
    if not arguments.config or not arguments.topology:
        raise ValueError(
            "nothing to plan: give --config=CONFIG and --topology=v5p:2x2x1; see --help"
        )
    batch = arguments.per_device_batch
    if batch is not None and batch < 1:
        raise ValueError(f"--per_device_batch={batch} should be at least 1")
    topology = find_topology(arguments.topology)
    config = load_config(arguments.config, arguments.overrides)
    if (
        topology.compiler != "cpu"
    ):  # what was compiled for absent devices cannot be read from a cache
        jax.config.update("jax_enable_compilation_cache", False)
    if arguments.search:
        found = find_batches(config, topology, remat_policies(config))
        plans = [entry.plan for entry in found if entry.plan is not None]
        print("\n\n".join([*map(as_text, plans), table(found)]))
        _write(arguments.json, [as_dict(plan) for plan in plans])
        if not plans:
            raise ValueError(f"not even one sample per device fits {topology.name}")
        return 0
    try:
        plan = make_plan(config, topology, batch)
    except DoesNotFit as error:
        size = batch or max(1, config.train.batch_size // len(topology.devices))
        help_ = advice(config, topology, size, error.needed, error.held)
        raise ValueError(f"{error}; {help_}") from error
    print(as_text(plan))
    _write(arguments.json, as_dict(plan))
    if plan.fits is False:
        size = int(plan.per_device_batch)
        help_ = advice(config, topology, size, plan.total, sum(plan.held))
        raise ValueError(f"{arguments.config} does not fit {topology.name}; {help_}")
    return 0


def _write(path: str | None, figures: Any) -> None:
    if path is not None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(json.dumps(figures, indent=2) + "\n")
