"""The `model` and `conditioning` sections -> a network with its embedders."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.build.binding import (
    ConfigError,
    bind,
    check_range,
    known_sections,
    pick,
    row,
)
from diffusion_jax.models.conditioner import EMBEDDERS, Embedder, embed, init_embedders
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.wrapper import (
    CONDITIONING_KEYS,
    apply_network,
    network_inputs,
)
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

MODELS = {"unet": UNet}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Network(NamedTuple):
    """A network and what conditions it; image_shape (h, w, c) is what it denoises."""

    module: nn.Module
    embedders: Mapping[str, Embedder]
    conditioning_key: str
    image_shape: tuple[int, int, int]

    def init(self, key: Array) -> PyTree:
        """Initialise {"network": ..., "conditioner": {embedder: ...}}, float32."""
        batch = self.example_inputs(1) | {"image": jnp.zeros((1, *self.image_shape))}
        embedder_key, network_key = jax.random.split(key)
        conditioner = init_embedders(self.embedders, batch, embedder_key)
        conditioning = embed(self.embedders, conditioner, batch)
        inputs = network_inputs(self.conditioning_key, batch["image"], conditioning)
        t = jnp.zeros((1,), jnp.int32)
        variables = self.module.init(network_key, inputs.x, t, context=inputs.context, y=inputs.y)
        return {"network": variables["params"], "conditioner": conditioner}

    def apply(
        self,
        params: PyTree,
        x: Array,
        t: Array,
        conditioning: Conditioning,
        dropout_key: Array | None = None,
    ) -> Array:
        """Evaluate the network: (params, x_t [b h w c], t [b], conditioning) -> model output,
        float32."""
        return apply_network(
            self.module, self.conditioning_key, params["network"], x, t, conditioning, dropout_key
        )

    def embed(
        self, params: PyTree, batch: Batch, keys: Keys | None = None, unconditional: bool = False
    ) -> Conditioning:
        """Compute the conditioning of a batch; keys switch on the training dropout of each
        embedder."""
        return embed(
            self.embedders, params["conditioner"], batch, keys, unconditional=unconditional
        )

    def example_inputs(self, size: int) -> dict[str, Array]:
        """Zeros of the shape and dtype of everything that the embedders read from a batch."""
        height, width, _ = self.image_shape
        return {
            embedder.input_key: (
                jnp.zeros((size,), jnp.int32)
                if embedder.channels is None
                else jnp.zeros((size, height, width, embedder.channels))
            )
            for embedder in self.embedders.values()
        }


def build_network(
    model: Mapping[str, Any], conditioning: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> Network:
    """Build the network of a config; ConfigError when an option is wrong or labels and network
    disagree."""
    module_class = row(MODELS, model, "config.model")
    keywords = bind(module_class, _with_dtypes(model), "config.model")
    known_sections(conditioning, ("key", "embedders"), "config.conditioning")
    key = conditioning["key"] if "key" in conditioning else "none"
    pick(CONDITIONING_KEYS, key, "config.conditioning.key")
    embedders = _embedders(conditioning["embedders"] if "embedders" in conditioning else {})
    network = Network(module_class(**keywords), embedders, key, image_shape)
    if network.module.out_channels != image_shape[-1]:
        raise ConfigError(
            f"config.model.out_channels = {network.module.out_channels} should be "
            f"{image_shape[-1]}, the channels of the images (config.data.batches.channels)"
        )
    _check_labels(network)
    return network


def _embedders(sections: Mapping[str, Any]) -> dict[str, Embedder]:
    embedders = {}
    for name, section in sections.items():
        path = f"config.conditioning.embedders.{name}"
        factory = row(EMBEDDERS, section, path)
        embedders[name] = factory(**bind(factory, section, path))
        check_range(embedders[name].ucg_rate, f"{path}.ucg_rate", low=0.0, high=1.0)
    return embedders


def _with_dtypes(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: pick(DTYPES, value, f"config.model.{key}")
        if key in ("dtype", "param_dtype")
        else value
        for key, value in model.items()
    }


def _check_labels(network: Network) -> None:
    rows = getattr(network.module, "num_classes", None)
    for name, embedder in network.embedders.items():
        is_label = embedder.embeds_labels_in_network
        if is_label and embedder.num_classes is not None and rows != embedder.num_classes + 1:
            raise ConfigError(
                f"config.model.num_classes = {rows!r} should be {embedder.num_classes + 1}: the "
                f"null class and the {embedder.num_classes} of config.conditioning.embedders.{name}"
            )
