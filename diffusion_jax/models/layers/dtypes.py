"""The dtypes of a module: fields that nearly all modules have."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class Dtypes:
    """What a module computes in, and what its parameters are stored in."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        """Both, as keywords for the layers of the module."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}
