"""What the content of a latent cache depends on, by names that a user knows."""

import dataclasses
import hashlib
import json
from typing import Any

import flax.linen as nn
import numpy as np

from diffusion_jax.data.records import Records
from diffusion_jax.experiment.config.options import LatentCacheOptions
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.models.conditioning.conditioner import Embedder, Text
from diffusion_jax.train.checkpoints.checksums import checksums
from diffusion_jax.types import PyTree

FORMAT = 2
# Options of batches that change what is kept; the others count only with buckets, and for clips.
_KEPT_OPTIONS = (
    "image_size channels crop resize pad random_flip buckets image_key label_key caption_key"
).split()
_BUCKET_OPTIONS = ("bucket_divisor", "max_aspect")
_CLIP_OPTIONS = ("num_frames", "frame_stride")
# Fields of modules that change no number.
_SILENT_FIELDS = ("parent", "name", "remat")


def cache_options(experiment: Experiment) -> LatentCacheOptions:
    """Give the options of a config's latent cache; ValueError when it has none."""
    if experiment.latent_cache is None:
        raise ValueError(
            "config.latent_cache is not set; give its folder: --config.latent_cache.folder=FOLDER"
        )
    return experiment.latent_cache


def describe_cache(experiment: Experiment, frozen: PyTree, source: Records) -> dict[str, Any]:
    """Map the name of everything that a cache depends on to its value.

    A name is a path in the config, or says in words what is not there.
    """
    options, data, network = cache_options(experiment), experiment.data, experiment.network
    assert network.first_stage is not None  # bind_latent_cache asks for it
    found = data.fingerprint(source)
    parts: dict[str, Any] = {
        "the format of the cache": FORMAT,
        "config.data.source.name": data.name,
        "the version of the data set": found["name"] if "name" in found else None,
        "config.data.splits.train": data.splits["train"],
        "the number of records": len(source),
        "the digest of the data set": found["digest"],
    }
    names = list(_KEPT_OPTIONS)
    if data.batch_options["buckets"]:
        names += _BUCKET_OPTIONS
        if data.batch_options["repeats_key"] is not None:  # repeats decide which buckets fill up
            names.append("repeats_key")
        parts["config.train.batch_size"] = experiment.training.batch_size
    if data.batch_options["num_frames"] is not None:
        names += _CLIP_OPTIONS
    if data.batch_options["caption"] is not None:  # which older caches do not have
        names.append("caption")
    for name in names:
        parts[f"config.data.batches.{name}"] = data.batch_options[name]
    parts |= _fields(network.first_stage.module, "config.first_stage")
    parts["the weights of config.first_stage"] = _fingerprint(frozen["first_stage"])
    if network.reads_frame:
        which = "first" if network.frame_place == 0 else "last"
        parts[f"the {which} frame of each clip"] = "uint8"
    if data.image_options.frame_columns:
        parts["the numbers of each frame"] = list(data.image_options.frame_columns)
    for name in ("text", "dtype", "shard_size"):
        parts[f"config.latent_cache.{name}"] = getattr(options, name)
    for name, embedder in cached_embedders(experiment).items():
        path = f"config.conditioning.embedders.{name}"
        assert embedder.text is not None  # only texts are kept
        tokenizer = network.tokenize[embedder.input_key][1]
        parts |= _fields(embedder.module, path)
        text, plain = embedder.text, Text()
        parts |= {f"{path}.{key}": getattr(text, key) for key in ("pad", "max_length")}
        for key in ("windows", "weighted"):  # which older caches do not have
            if getattr(text, key) != getattr(plain, key):
                parts[f"{path}.{key}"] = getattr(text, key)
        vocabulary = hashlib.sha256(tokenizer.tokenizer.to_str().encode()).hexdigest()[:16]
        parts[f"the vocabulary of {path}"] = vocabulary
        parts[f"{path}.null_value"] = _plain(embedder.null_value)
        parts[f"the weights of {path}"] = _fingerprint(frozen["conditioner"][name])
    return parts


def cached_embedders(experiment: Experiment) -> dict[str, Embedder]:
    """Pick the embedders whose outputs are kept: frozen encoders of the captions."""
    if not cache_options(experiment).text:
        return {}
    return {
        name: embedder
        for name, embedder in experiment.network.embedders.items()
        if embedder.text is not None
        and embedder.text.source == "caption"
        and not embedder.trainable
    }


def _fields(module: nn.Module, path: str) -> dict[str, Any]:
    """List the fields of a module, together with the fields of the modules in it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name) if field.name not in _SILENT_FIELDS else None
        if isinstance(value, nn.Module):
            found = _fields(value, path) | found
        elif field.name not in _SILENT_FIELDS:
            found[f"{path}.{field.name}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()[:16]
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value.__name__ if hasattr(value, "__name__") else str(value)


def _fingerprint(tree: PyTree) -> str:
    return hashlib.sha256(json.dumps(checksums(tree), sort_keys=True).encode()).hexdigest()[:16]
