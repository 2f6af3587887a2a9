"""Encoders that are frozen unless the pattern of what is trained names them."""

import re

import jax

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.train.checkpoints.checksums import named_leaves

_CONDITIONER = "conditioner"


def with_trainable(network: Network, pattern: str | None) -> Network:
    """Make the frozen encoders trainable that train.trainable names.

    The pattern has to have the word "conditioner" in it, and be found in the path of a parameter,
    such as "conditioner/clip/encoder/layers_0/mlp/fc1/kernel", from a place in "conditioner/clip/"
    on. So "attn" alone is about the network, whatever encoders have in their paths.
    """
    if pattern is None or _CONDITIONER not in pattern:
        return network
    frozen = jax.eval_shape(network.init_frozen, jax.random.key(0))[_CONDITIONER]
    embedders = dict(network.embedders)
    for name, params in frozen.items():
        prefix = f"{_CONDITIONER}/{name}/"
        found = (re.search(pattern, prefix + path) for path in named_leaves(params))
        if any(match is not None and match.start() < len(prefix) for match in found):
            embedders[name] = embedders[name]._replace(trainable=True)
    return network._replace(embedders=embedders)
