"""Ahead-of-time plans: memory, FLOPs, time and traffic of a training step on devices that are not
there."""

from diffusion_jax.plan.compiling import DoesNotFit, Plan, make_plan
from diffusion_jax.plan.search import Found, remat_policies, search
from diffusion_jax.plan.topology import Topology, find_topology

__all__ = [
    "DoesNotFit",
    "Found",
    "Plan",
    "Topology",
    "find_topology",
    "make_plan",
    "remat_policies",
    "search",
]
