"""What embedders give to a network: shapes and dtypes, without computing anything."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from diffusion_jax.models.conditioning.conditioner import (
    Embedder,
    embed,
    name_outputs,
)
from diffusion_jax.models.conditioning.windows import encode_windows
from diffusion_jax.types import Conditioning


def conditioning_shapes(
    embedders: Mapping[str, Embedder], image_shape: tuple[int, int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Find the shape and dtype of the Conditioning of one sample; nothing is computed.

    Raises ValueError when outputs of embedders that meet in one entry cannot be joined.
    """
    outputs = {}
    for name, embedder in embedders.items():
        example = jax.eval_shape(lambda e=embedder: e.example(1, image_shape))
        is_text = embedder.text is not None
        outputs[name] = _output_shapes(embedder.module, example.shape, example.dtype, is_text)

    def join(outputs: Mapping[str, tuple[Array, ...]]) -> Conditioning:
        named = [name_outputs(name, own) for name, own in outputs.items()]
        batch = {key: output for own in named for key, output in own.items()}
        return embed(embedders, {}, batch, null_outputs=batch)

    return jax.eval_shape(join, outputs)


@functools.cache
def _output_shapes(
    module: nn.Module, shape: tuple[int, ...], dtype: Any, is_text: bool
) -> tuple[Any, ...]:
    # Text encoders take seconds to trace, and every experiment asks for them again.
    def compute(value: Array) -> Any:
        return module.init_with_output(jax.random.key(0), value)[0]

    compute_all = functools.partial(encode_windows, compute) if is_text else compute
    outputs = jax.eval_shape(compute_all, jax.ShapeDtypeStruct(shape, dtype))
    return outputs if isinstance(outputs, tuple) else (outputs,)
