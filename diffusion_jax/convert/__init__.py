"""Files of other programs <-> our parameters and configs, without torch."""

from diffusion_jax.convert.weights.exporting import export_network
from diffusion_jax.convert.weights.identify import describe_weights
from diffusion_jax.convert.weights.importing import import_network

__all__ = ["describe_weights", "export_network", "import_network"]
