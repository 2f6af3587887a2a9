"""The arguments of a train step, abstract and with their shardings: (state, batch, frozen)."""

import jax
import jax.numpy as jnp

from diffusion_jax.devices.mesh import batch_sharding, replicated
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.frames import FRAME
from diffusion_jax.models.conditioning.conditioner import name_outputs, outputs_of
from diffusion_jax.runs.latent_key import cache_options, cached_embedders
from diffusion_jax.types import PyTree


def arguments_of(built: Experiment) -> tuple[PyTree, PyTree, PyTree]:
    """Make the arguments of a train step as training would hold them, without values.

    With config.latent_cache the batch has moments and the outputs of text encoders in place of
    images and tokens, and of a video the frame that conditions it.
    """
    batch, frozen = built.abstract_batch(), built.abstract_frozen()
    if built.latent_cache is not None:
        batch, null = _from_cache(built, batch, frozen)
        frozen = {**frozen, "null_outputs": _placed(null, replicated(built.mesh))}
    return built.abstract_state(), _placed(batch, batch_sharding(built.mesh)), frozen


def _from_cache(built: Experiment, batch: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """The batch that a latent cache gives, and what stands for its dropped texts.

    Moments are read as float32, the outputs of encoders as they are kept.
    """
    stage, embedders = built.network.first_stage, cached_embedders(built)
    assert stage is not None  # a cache is of its latents

    def encode(frozen: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        outputs = {}
        for name, embedder in embedders.items():
            tokens = batch[embedder.input_key]
            found = outputs_of(embedder, frozen["conditioner"][name], tokens)
            outputs |= name_outputs(name, found)
        return stage.moments(frozen["first_stage"], batch["image"]), outputs

    moments, outputs = jax.eval_shape(encode, frozen, batch)
    null = {key: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for key, leaf in outputs.items()}
    dtype = cache_options(built).dtype
    kept = {key: jax.ShapeDtypeStruct(leaf.shape, dtype) for key, leaf in outputs.items()}
    kept["moments"] = jax.ShapeDtypeStruct(moments.shape, jnp.float32)
    if built.network.reads_frame:
        place = built.network.frame_place
        kept[FRAME] = jax.eval_shape(lambda clip: clip[:, place], batch["image"])
    replaced = {"image", *(embedder.input_key for embedder in embedders.values())}
    return {key: leaf for key, leaf in batch.items() if key not in replaced} | kept, null


def _placed(tree: PyTree, sharding: jax.sharding.NamedSharding) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
