"""What the metrics of samples are computed with: their options and a feature network by name."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights.feature_networks import (
    NAMES,
    feature_file,
    read_clip,
    read_clip_text,
    read_feature_network,
)
from diffusion_jax.data.tokenizer import clip_tokenizer
from diffusion_jax.metrics.extraction import Extractor, digest
from diffusion_jax.metrics.scores import check_count, find_metrics
from diffusion_jax.models.features import clip, dinov2, efficientnet_lite0, i3d, inception

# Digests begin like this; a change of what is computed from equal weights changes it.
_VERSION = "1"


class ScoringOptions(NamedTuple):
    """Which metrics, of how many samples, by which features, against which reference.

    metrics: names of metrics.scores. features: the feature network; weights: its file, None for
    a package's file. num_samples: drawn with the averaged weights, always from the same noise and
    conditions. num_steps, guidance_scale: of sampling, None for the config's. batch_size: samples
    drawn at once. split: of the data to compare with. reference: a .npz file to compare with
    instead, of EDM, ADM or this package.
    """

    metrics: tuple[str, ...] = ("mind", "kernel")
    features: str = efficientnet_lite0.NAME
    weights: str | None = None
    num_samples: int = 1000
    num_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 64
    split: str = "train"
    reference: str | None = None


class Levels(NamedTuple):
    """How many noise levels are looked at, on how many images of the validation split.

    bits_images: for how many of them the bits per dimension of a pixel model are bounded as well,
    one network call for each image and timestep; 0 for none.
    """

    num_levels: int = 10
    num_images: int = 64
    bits_images: int = 0


def check_scoring(options: ScoringOptions) -> None:
    """Find out before long work whether the options fit together and the weights are there.

    Raises ValueError or FileNotFoundError.
    """
    for name in ("num_samples", "batch_size"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"{name} = {value} should be at least 1")
    if options.reference is not None and not Path(os.path.expanduser(options.reference)).is_file():
        raise FileNotFoundError(f"there are no statistics at {options.reference}")
    feature_file(options.features, options.weights)
    features = f"clip_{clip.CMMD_SIZE}" if options.features == clip.NAME else options.features
    metrics = find_metrics(options.metrics, features)
    if options.features in _WIDTHS:
        check_count(metrics, options.num_samples, _WIDTHS[options.features])


def make_extractor(name: str, weights: str | os.PathLike | None = None) -> Extractor:
    """Make a feature network from a file, or from the package that ships its weights.

    Raises ValueError for an unknown name or a file of another network, FileNotFoundError where
    there is no file.
    """
    path = feature_file(name, weights)
    if name == clip.NAME:
        tower, params = read_clip(path)
        run = functools.partial(clip.features, tower=tower)
        label = f"{clip.NAME}_{tower.image_size}"
        return Extractor(label, _key(params), tower.projection_dim, params, run)
    params = read_feature_network(name, path)
    extractor = Extractor(name, _key(params), 0, params, _FEATURES[name])
    if name == dinov2.NAME:
        return extractor._replace(width=params["layernorm"]["bias"].shape[0])
    extractor = extractor._replace(width=_WIDTHS[name], of_videos=name == i3d.NAME)
    if name == inception.NAME:
        return extractor._replace(probabilities=_probabilities)
    return extractor


def make_texts(weights: str | os.PathLike | None) -> Callable[[Sequence[str]], np.ndarray]:
    """Make texts -> embeddings [n d] of the text tower in a file of a whole CLIP.

    Raises ValueError where the file holds no text tower, FileNotFoundError for no file.
    """
    path = feature_file(clip.NAME, weights)
    tower, params = read_clip_text(path, read_clip(path)[0])
    tokenize = clip_tokenizer(max_length=tower.max_length)
    run = jax.jit(functools.partial(clip.text_features, tower=tower))

    def texts(captions: Sequence[str]) -> np.ndarray:
        tokens = tokenize(captions)
        parts = [tokens[i : i + _TEXTS] for i in range(0, len(tokens), _TEXTS)]
        return np.concatenate([np.asarray(run(params, part)) for part in parts])

    return texts


# Texts that are embedded at once.
_TEXTS = 256
_FEATURES = {
    module.NAME: module.features for module in (dinov2, efficientnet_lite0, i3d, inception)
}
_WIDTHS = {module.NAME: module.WIDTH for module in (efficientnet_lite0, i3d, inception)}
assert {*_FEATURES, clip.NAME} == set(NAMES)


def _probabilities(params, features):
    return jax.nn.softmax(inception.logits(params, features))


def _key(params) -> str:
    return f"{_VERSION}:{digest(params)}"
