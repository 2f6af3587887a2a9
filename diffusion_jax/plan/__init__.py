"""Plans: memory, FLOPs, time and traffic of a training step on devices that you do not have."""

from diffusion_jax.plan.compiling import DoesNotFit, Plan, make_plan
from diffusion_jax.plan.search import Found, find_batches, remat_policies
from diffusion_jax.plan.topology import Topology, find_topology

__all__ = [
    "DoesNotFit",
    "Found",
    "Plan",
    "Topology",
    "find_batches",
    "find_topology",
    "make_plan",
    "remat_policies",
]
