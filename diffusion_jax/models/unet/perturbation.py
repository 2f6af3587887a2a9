"""A UNet made worse on purpose: self-attention of its middle block looks at nothing but itself."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from diffusion_jax.models.layers.attention import AttentionBlock, identity_attention
from diffusion_jax.models.layers.transformer import CrossAttention

MIDDLE = "middle_block_1"


@contextlib.contextmanager
def identity_in_the_middle() -> Iterator[None]:
    """Replace the map of every self-attention in the middle block by the identity, while tracing.

    Each token then gets its own value: softmax(q k^T / sqrt(d)) v becomes v. All else is as it was.
    Source: Ahn et al. 2024, Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance,
    equation 14, with the layer that they choose.
    """

    def intercept(call: Any, args: Any, keywords: Any, where: Any) -> Any:
        module = where.module
        to_itself = isinstance(module, AttentionBlock) or (
            isinstance(module, CrossAttention) and all(context is None for context in args[1:])
        )
        if not (to_itself and MIDDLE in module.path and where.method_name == "__call__"):
            return call(*args, **keywords)
        with identity_attention():
            return call(*args, **keywords)

    with nn.intercept_methods(intercept):
        yield
