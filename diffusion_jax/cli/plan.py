"""`plan`: memory, FLOPs and time of a config on devices that are not there."""

import argparse
import json
import pathlib

from diffusion_jax.plan.planning import plan_config


def run(arguments: argparse.Namespace) -> int:
    """Plan a training run, print the plan, write it as JSON; return 0, or 2 if it does not fit."""
    if not arguments.config or not arguments.topology:
        raise ValueError(
            "nothing to plan: give --config=CONFIG and --topology=v5p:2x2x1; see --help"
        )
    planned = plan_config(
        arguments.config,
        arguments.topology,
        overrides=arguments.overrides,
        per_device_batch=arguments.per_device_batch,
        search=arguments.search,
    )
    print(planned.text)
    if arguments.json is not None:
        path = pathlib.Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(planned.figures, indent=2) + "\n")
    if planned.problem is not None:
        raise ValueError(planned.problem)
    return 0
