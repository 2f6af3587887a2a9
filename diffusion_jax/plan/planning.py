"""What `plan` computes: one plan, or a search for the largest batch, and what is wrong with it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.plan.compiling import DoesNotFit, make_plan
from diffusion_jax.plan.report import advice, as_dict, as_text, table
from diffusion_jax.plan.search import find_batches, remat_policies
from diffusion_jax.plan.topology import find_topology


class Planned(NamedTuple):
    """A plan, or several of a search, as text and as figures for JSON.

    problem: what does not fit, and what would; None if it fits.
    """

    text: str
    figures: Any
    problem: str | None


def plan_config(
    path: str,
    topology_name: str,
    *,
    overrides: Sequence[str] = (),
    per_device_batch: int | None = None,
    search: bool = False,
) -> Planned:
    """Plan the training of a config on devices that are not there.

    Raises ValueError for what cannot be planned, and for what the compiler refuses because it does
    not fit.
    """
    batch = per_device_batch
    if batch is not None and batch < 1:
        raise ValueError(f"--per_device_batch={batch} should be at least 1")
    topology = find_topology(topology_name)
    config = load_config(path, overrides)
    if topology.compiler != "cpu":  # a cache cannot give what was compiled for absent devices
        jax.config.update("jax_enable_compilation_cache", False)
    if search:
        found = find_batches(config, topology, remat_policies(config))
        plans = [entry.plan for entry in found if entry.plan is not None]
        text = "\n\n".join([*map(as_text, plans), table(found)])
        problem = None if plans else f"not even one sample per device fits {topology.name}"
        return Planned(text, [as_dict(plan) for plan in plans], problem)
    try:
        plan = make_plan(config, topology, batch)
    except DoesNotFit as error:
        size = batch or max(1, config.train.batch_size // len(topology.devices))
        would = advice(config, topology, size, error.needed, error.held)
        raise ValueError(f"{error}; {would}") from error
    problem = None
    if plan.fits is False:
        would = advice(config, topology, int(plan.per_device_batch), plan.total, sum(plan.held))
        problem = f"{path} does not fit {topology.name}; {would}"
    return Planned(as_text(plan), as_dict(plan), problem)
