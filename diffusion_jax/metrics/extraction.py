"""Features of batches of images or videos, computed on all devices of a mesh."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import batch_sharding, batch_shards, on_mesh, replicated
from diffusion_jax.metrics.statistics import Statistic
from diffusion_jax.types import PyTree


class Extractor(NamedTuple):
    """A network with its weights.

    key: a digest of the weights. features: (params, images [b h w 3] in [0, 255]) -> [b d], or
    videos [b t h w 3] where of_videos. width: d. probabilities: (params, features) -> the
    probabilities of classes [b c], None for a network without classes.
    """

    name: str
    key: str
    width: int
    params: PyTree
    features: Callable[[PyTree, Array], Array]
    of_videos: bool = False
    probabilities: Callable[[PyTree, Array], Array] | None = None


# (images [b ...] in [-1, 1], ids [b]), on the host or on the mesh -> (what is extracted, ids)
Extract = Callable[[Any, Any], tuple[dict[str, np.ndarray], np.ndarray]]


def build_extract(extractor: Extractor, mesh: Mesh) -> Extract:
    """Make extract(images, ids) -> ({"features": [b d], "probabilities": [b c]}, ids) on the host.

    Images in [-1, 1] are rounded to the 256 levels that a file would hold; grey ones become RGB.
    Raises ValueError for videos where the network sees images, and the other way round.
    """
    params = jax.device_put(extractor.params, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def run(params: PyTree, images: Array, ids: Array) -> tuple[dict[str, Array], Array]:
        found = {"features": extractor.features(params, to_levels(images)).astype(jnp.float32)}
        if extractor.probabilities is not None:
            found["probabilities"] = extractor.probabilities(params, found["features"])
        return found, ids

    def extract(images: Any, ids: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        wanted, kind = (5, "videos") if extractor.of_videos else (4, "images")
        if images.ndim != wanted:
            raise ValueError(
                f"features = {extractor.name!r} are features of {kind}, and they are given "
                f"an array of shape {images.shape}"
            )
        if isinstance(images, np.ndarray):
            splits = images.shape[0] % batch_shards(mesh) == 0
            rows = batch_sharding(mesh) if splits else replicated(mesh)
            images, ids = put((images, ids.astype(np.int32)), rows)
        return jax.device_get(run(params, images, ids))

    return extract


def to_levels(images: Float[Array, "b *shape"]) -> Float[Array, "b *out"]:
    """Round images in [-1, 1] to the levels 0 to 255, and repeat a single channel three times.

    NaN becomes black. Raises ValueError for another number of channels.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images of {images.shape[-1]} channels should have 1 or 3")
    images = jnp.nan_to_num(images.astype(jnp.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
    levels = jnp.rint((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5)
    return jnp.broadcast_to(levels, (*images.shape[:-1], 3))


def stream_all(statistic: Statistic, extract: Extract, batches: Iterable[tuple[Any, Any]]) -> Any:
    """Compute a statistic of the features of batches (images, ids)."""
    state = statistic.init()
    for images, ids in batches:
        found, ids = extract(images, ids)
        state = statistic.update(state, found["features"], ids)
    return statistic.result(state)


def digest(params: PyTree) -> str:
    """Compute a digest of the names, shapes and numbers of parameters."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
