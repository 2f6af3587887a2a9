"""The `model` and `conditioning` sections -> a network with its embedders."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.data.tokenizer import ClipTokenizer
from diffusion_jax.experiment.binding import (
    ConfigError,
    bind,
    check_range,
    check_type,
    known_sections,
    pick,
    row,
    with_dtypes,
)
from diffusion_jax.experiment.first_stage import FirstStage, build_first_stage
from diffusion_jax.experiment.text import tokenizers_of, with_null_tokens
from diffusion_jax.models.conditioning.conditioner import (
    Embedder,
    cached_outputs,
    embed,
    init_embedders,
)
from diffusion_jax.models.conditioning.embedders import EMBEDDERS
from diffusion_jax.models.conditioning.routing import (
    CONDITIONING_KEYS,
    apply_network,
    network_inputs,
)
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

MODELS = {"unet": UNet}


class Network(NamedTuple):
    """A network, what conditions it and the first stage in whose latents it works, if any.

    image_shape (h, w, c) is what it denoises: latents or pixels. tokenize: name of tokens in a
    batch -> (name of the strings that they come from, strings -> int32 [n l]). force_uc_zero:
    embedders whose outputs are zero in the unconditional half of guidance.
    """

    module: UNet
    embedders: Mapping[str, Embedder]
    conditioning_key: str
    image_shape: tuple[int, int, int]
    first_stage: FirstStage | None = None
    tokenize: Mapping[str, tuple[str, ClipTokenizer]] = {}
    force_uc_zero: tuple[str, ...] = ()

    def init(self, key: Array) -> PyTree:
        """Initialise what is trained: {"network": ..., "conditioner": {embedder: ...}}, float32."""
        batch = self.example_inputs(1)
        embedder_key, network_key = jax.random.split(key)
        conditioner = init_embedders(self.embedders, batch, embedder_key, trainable=True)
        shapes = jax.eval_shape(self._embed_anew, batch, jax.random.key(0))
        conditioning = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        x = jnp.zeros((1, *self.image_shape))
        inputs = network_inputs(self.conditioning_key, x, conditioning)
        t = jnp.zeros((1,), jnp.int32)
        variables = self.module.init(network_key, inputs.x, t, context=inputs.context, y=inputs.y)
        return {"network": variables["params"], "conditioner": conditioner}

    def init_frozen(self, key: Array) -> PyTree:
        """Initialise what is not trained: {"conditioner": {embedder: ...}, "first_stage": ...}."""
        embedder_key, first_stage_key = jax.random.split(key)
        batch = self.example_inputs(1)
        conditioner = init_embedders(self.embedders, batch, embedder_key, trainable=False)
        stage = self.first_stage
        if stage is None:
            return {"conditioner": conditioner, "first_stage": {}}
        frozen = {"conditioner": conditioner, "first_stage": stage.init(first_stage_key)}
        return frozen | ({"scale_factor": jnp.float32(1.0)} if stage.scale_by_std else {})

    def constants(self) -> dict[str, Array]:
        """Give the factor of the latents, where it is known."""
        stage = self.first_stage
        if stage is None or stage.scale_by_std:
            return {}
        return {"scale_factor": jnp.float32(stage.scale_factor)}

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
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: Keys | None = None,
        *,
        unconditional: bool = False,
        kept: Collection[str] = (),
    ) -> Conditioning:
        """Compute the conditioning of a batch; keys switch on the training dropout of each
        embedder. unconditional and kept: see models.conditioner.embed."""
        return embed(
            self.embedders,
            {**frozen["conditioner"], **params["conditioner"]},
            batch,
            keys,
            unconditional=unconditional,
            kept=kept,
            force_zero=self.force_uc_zero if unconditional else (),
            null_outputs=frozen["null_outputs"] if "null_outputs" in frozen else {},
        )

    def encode(self, frozen: PyTree, batch: Batch, keys: Keys) -> Array:
        """Find what the network learns to denoise, float32: the images, or samples of latents times
        the scale factor; from the moments of their posteriors if the batch has them. Source:
        latent-diffusion, get_first_stage_encoding."""
        if self.first_stage is None:
            return batch["image"]
        if "moments" in batch:
            latents = self.first_stage.draw(batch["moments"], keys)
        else:
            latents = self.first_stage.encode(frozen["first_stage"], batch["image"], keys)
        return frozen["scale_factor"] * latents

    def encode_mode(self, frozen: PyTree, image: Array) -> Array:
        """Find what stands for an image without chance: the image, or the mode of its latents."""
        if self.first_stage is None:
            return image
        latents = self.first_stage.encode(frozen["first_stage"], image, None)
        return frozen["scale_factor"] * latents

    def size_multiple(self) -> int:
        """Tell what the sides of an image must be multiples of, in pixels."""
        first_stage = 1 if self.first_stage is None else self.first_stage.factor
        return first_stage * self.module.patch_size * 2 ** (len(self.module.channel_mult) - 1)

    def shape_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """Find the shape that the network denoises for images of (height, width) pixels.

        None is the size of the data.
        """
        if size is None:
            return self.image_shape
        factor = 1 if self.first_stage is None else self.first_stage.factor
        return (size[0] // factor, size[1] // factor, self.image_shape[-1])

    def decode(self, frozen: PyTree, x: Array) -> Array:
        """Turn what the network denoised into images [b h w c] in about [-1, 1], float32."""
        if self.first_stage is None:
            return x
        return self.first_stage.decode(frozen["first_stage"], x / frozen["scale_factor"])

    def example_inputs(self, size: int) -> dict[str, Array]:
        """Zeros of the shape and dtype of everything that the embedders read from a batch."""
        return {
            embedder.input_key: embedder.example(size, self.image_shape)
            for embedder in self.embedders.values()
        }

    def with_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a host batch what embedders read and it lacks: tokens of its strings, defaults.

        Embedders whose outputs the batch holds read nothing.
        """
        read = {e.input_key for n, e in self.embedders.items() if not cached_outputs(batch, n)}
        tokens = {
            key: tokenize([str(text) for text in batch[source]])
            for key, (source, tokenize) in self.tokenize.items()
            if source in batch and key not in batch and key in read
        }
        count, height, width = _size_of(batch)
        defaults = {
            embedder.input_key: np.tile(
                np.asarray(
                    (height, width) if embedder.default == "size" else embedder.default,
                    embedder.dtype,
                ),
                (count, 1),
            )
            for embedder in self.embedders.values()
            if embedder.default is not None and embedder.input_key not in batch
        }
        return {**batch, **tokens, **defaults}

    def _embed_anew(self, batch: Batch, key: Array) -> Conditioning:
        trained_key, frozen_key = jax.random.split(key)
        params = init_embedders(self.embedders, batch, trained_key, trainable=True)
        params |= init_embedders(self.embedders, batch, frozen_key, trainable=False)
        return embed(self.embedders, params, batch)


def _size_of(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number, height and width of the images that a batch has, or that its moments come from."""
    if "image" in batch:
        return np.shape(batch["image"])[:3]
    return len(batch["moments"]), *batch["target_size"][0].tolist()


def build_network(
    model: Mapping[str, Any],
    conditioning: Mapping[str, Any],
    data_shape: tuple[int, int, int],
    first_stage: Mapping[str, Any] | None = None,
) -> Network:
    """Build the network of a config for images of data_shape; ConfigError when an option is wrong
    or labels, channels and network disagree."""
    module_class = row(MODELS, model, "config.model")
    keywords = bind(module_class, with_dtypes(model, "config.model"), "config.model")
    known_sections(conditioning, ("key", "embedders", "force_uc_zero"), "config.conditioning")
    key = conditioning["key"] if "key" in conditioning else "none"
    pick(CONDITIONING_KEYS, key, "config.conditioning.key")
    embedders = _embedders(conditioning["embedders"] if "embedders" in conditioning else {})
    stage = None if first_stage is None else build_first_stage(first_stage, data_shape)
    network = Network(
        module_class(**keywords),
        embedders,
        key,
        data_shape if stage is None else stage.latent_shape,
        stage,
        tokenizers_of(embedders),
        _force_uc_zero(conditioning, embedders),
    )
    if network.module.out_channels != network.image_shape[-1]:
        wanted = "the images (config.data.batches.channels)" if stage is None else "the latents"
        raise ConfigError(
            f"config.model.out_channels = {network.module.out_channels} should be "
            f"{network.image_shape[-1]}, the channels of {wanted}"
        )
    _check_labels(network)
    return network


def _embedders(sections: Mapping[str, Any]) -> dict[str, Embedder]:
    embedders = {}
    for name, section in sections.items():
        path = f"config.conditioning.embedders.{name}"
        factory = row(EMBEDDERS, section, path)
        section = with_dtypes(section, path)
        embedder = factory(**bind(factory, section, path))
        check_range(embedder.ucg_rate, f"{path}.ucg_rate", low=0.0, high=1.0)
        embedders[name] = with_null_tokens(embedder, path)
    return embedders


def _force_uc_zero(
    conditioning: Mapping[str, Any], embedders: Mapping[str, Embedder]
) -> tuple[str, ...]:
    path = "config.conditioning.force_uc_zero"
    names = conditioning["force_uc_zero"] if "force_uc_zero" in conditioning else ()
    names = tuple(check_type(tuple(names), tuple[str, ...], path))
    for name in names:
        pick(embedders, name, path)
    return names


def _check_labels(network: Network) -> None:
    rows = getattr(network.module, "num_classes", None)
    for name, embedder in network.embedders.items():
        is_label = embedder.embeds_labels_in_network
        if is_label and embedder.num_classes is not None and rows != embedder.num_classes + 1:
            raise ConfigError(
                f"config.model.num_classes = {rows!r} should be {embedder.num_classes + 1}: the "
                f"null class and the {embedder.num_classes} of config.conditioning.embedders.{name}"
            )
