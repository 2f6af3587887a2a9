"""Images -> what a network denoises, and back, as compiled functions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import batch_sharding, on_mesh, replicated
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.types import PyTree

# (frozen, rows) -> rows; the number of rows divides by the devices of the mesh.
Code: TypeAlias = Callable[[PyTree, np.ndarray], Array]


class Coders(NamedTuple):
    """The two directions between images and what a network denoises.

    encode: images [b h w c] in [-1, 1] -> the mode of their latents times the scale factor; without
    a first stage the images. decode: the way back, to images [b h w c] of about [-1, 1].
    """

    encode: Code
    decode: Code


def build_coders(network: Network, mesh: Mesh) -> Coders:
    """Make the coders of a network, each compiled once per shape of its rows."""
    return Coders(*(_compiled(code, mesh) for code in (network.encode_mode, network.decode)))


def _compiled(code: Callable[[PyTree, Any], Array], mesh: Mesh) -> Code:
    run = functools.partial(jax.jit, out_shardings=replicated(mesh))(on_mesh(mesh, code))
    return lambda frozen, rows: run(frozen, put(rows, batch_sharding(mesh)))
