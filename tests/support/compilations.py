"""How often a function was compiled, by its name.

JAX's own count, `_cache_size` of a jitted function, may be 0 in a process that has jitted thousands
of others: what it counts is then forgotten, though nothing is compiled again.
"""

from collections import Counter

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled: Counter[str] = Counter()


def times_compiled(name: str) -> int:
    """Return how many programs of functions of this name were compiled in this process."""
    return _compiled[f"jit({name})"]


def _count(event: str, seconds: float, **facts: str | int) -> None:
    if event == _EVENT:
        _compiled[str(facts["fun_name"])] += 1


monitoring.register_event_duration_secs_listener(_count)
