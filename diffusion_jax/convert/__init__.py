"""Files of other programs <-> our parameters and configs, without torch.

    from diffusion_jax.convert import describe_weights, export_network, import_network

These names are loaded on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_jax.convert.weights.exporting import export_network
    from diffusion_jax.convert.weights.identify import describe_weights
    from diffusion_jax.convert.weights.importing import import_network

_HOMES = {
    "describe_weights": "diffusion_jax.convert.weights.identify",
    "export_network": "diffusion_jax.convert.weights.exporting",
    "import_network": "diffusion_jax.convert.weights.importing",
}
__all__ = ["describe_weights", "export_network", "import_network"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'diffusion_jax.convert' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
