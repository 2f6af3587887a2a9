"""Sampling as one program in a file, which JAX runs without this package."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, UInt

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.task import Trained
from diffusion_jax.randomness import sample_keys
from diffusion_jax.types import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
# What the format of the file can hold, less the program itself.
_MOST_BYTES = 2**31 - 2**24


def write_stablehlo(
    experiment: Experiment,
    trained: Trained,
    path: str | os.PathLike,
    *,
    batch_size: int = 1,
    dtype: Any = None,
) -> str:
    """Write sampling with a model's weights, steps and guidance as a program -> how to call it.

    The program is a function of the inputs of the embedders and of a seed, which gives uint8 images
    [batch_size, h, w, c]; image i is the one that Pipeline draws as number i of this seed.
    experiment: on one device. dtype: of the weights in the file; the program computes as before.
    Raises ValueError for a model of videos, and for weights that the file cannot hold.
    """
    path = pathlib.Path(path)
    if experiment.network.num_frames is not None:
        raise ValueError(f"--to={path} holds a program that draws images; this model draws videos")
    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} should be at least 1")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError(f"{path} needs flatbuffers: pip install flatbuffers")
    weights = {"params": trained.params, "frozen": trained.frozen}
    stored = jax.tree.map(lambda leaf: _stored(leaf, dtype), weights)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path} would hold {size / 1e9:.1f} GB of weights and can hold {_MOST_BYTES / 1e9:.1f}"
            " GB; --dtype=bfloat16 may halve them, and a .safetensors file has no such limit"
        )
    inputs = jax.eval_shape(lambda: experiment.task.example_inputs(batch_size))
    program = jax.jit(_program(experiment, stored, weights, batch_size))
    exported = export.export(program, platforms=PLATFORMS)(
        inputs, jax.ShapeDtypeStruct((), jnp.uint32)
    )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.write_bytes(exported.serialize())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    given = ", ".join(f"{name!r}: {_words(leaf)}" for name, leaf in inputs.items())
    return (
        f'jax.export.deserialize(open("{path.name}", "rb").read()).call({{{given}}}, uint32 seed) '
        f"-> {_words(exported.out_avals[0])}"
    )


def _program(experiment: Experiment, stored: PyTree, like: PyTree, batch_size: int) -> Any:
    def draw(inputs: Mapping[str, Array], seed: UInt[Array, ""]) -> UInt[Array, "b h w c"]:
        cast = jax.tree.map(lambda leaf, own: jnp.asarray(leaf, own.dtype), stored, like)
        keys = sample_keys(jax.random.key(seed), jnp.arange(batch_size))
        drawn = experiment.sample_fn(cast["params"], cast["frozen"], inputs, keys)
        # As to_pixels does it, which is for the host.
        x = jnp.nan_to_num(drawn.x.astype(jnp.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
        return jnp.rint((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

    return draw


def _stored(leaf: Any, dtype: Any) -> np.ndarray:
    array = np.asarray(leaf)
    casts = dtype is not None and array.ndim > 1 and jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(dtype) if casts else array


def _words(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}"
