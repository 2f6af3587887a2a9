"""Open any TFDS data set by name and split, as records that can be read in any order."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, file_adapters

from diffusion_jax.data.records import Records, find_features
from diffusion_jax.data.sources import (
    coloured_blocks,
    image_folder,
    mnist_subset,
    moving_digits,
    openmoji,
    parquet_folder,
    preparation,
    tar_folder,
    video_folder,
    view_folder,
)

# Builders of this package: name -> factory(data_dir, **options). They prepare themselves without a
# network.
OWN_BUILDERS: dict[str, Callable[..., tfds.core.DatasetBuilder]] = {
    "mnist_subset": mnist_subset.MnistSubset,
    "openmoji": openmoji.builder,
    "moving_digits": moving_digits.builder,
    "coloured_blocks": coloured_blocks.builder,
    "image_folder": image_folder.builder,
    "tar_folder": tar_folder.builder,
    "parquet_folder": parquet_folder.builder,
    "video_folder": video_folder.builder,
    "view_folder": view_folder.builder,
}


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    **builder_config: Any,
) -> Records:
    """Open one split of a TFDS data set for random access; needs no TensorFlow.

    Images stay encoded (bytes) until make_batches decodes them; the other features are decoded by
    TFDS.

    Args:
        name: "cifar10", "imagenette/160px-v2", "cifar10:3.0.2", ... as for tfds.builder; the name
            of a builder of this package (mnist_subset, openmoji, moving_digits, coloured_blocks,
            image_folder, tar_folder, parquet_folder, video_folder, view_folder), which is prepared
            on first use; or the path of a prepared version (".../cifar10/3.0.2").
        split: "train", "train[:90%]", "train+test", ...
        data_dir: where data sets are prepared; default: the environment variable TFDS_DATA_DIR,
            else ~/tensorflow_datasets.
        download: whether a data set that is not prepared may be downloaded and prepared now.
        builder_config: options of the builder: config, version, or what the package's builder
            takes.

    Returns:
        A sequence of dicts with len(), integer indexing and .dataset_info.

    Raises:
        FileNotFoundError: not prepared, and download is False.
        ConnectionError: download is True and the host of the data set does not answer within
            seconds.
        ModuleNotFoundError: preparing needs a package that is not installed.
        ValueError: unknown name, option, configuration or split, or prepared in a format without
            random access.
    """
    data_dir = os.path.expanduser(data_dir or constants.get_default_data_dir())
    builder: Any  # the decorators of TFDS hide its signatures from type checkers
    if name in OWN_BUILDERS:
        with preparation.quiet():
            builder = _own_builder(name, data_dir, builder_config)
            preparation.prepare(builder)
    else:
        builder = preparation.prepared_builder(
            name, data_dir=data_dir, download=download, **builder_config
        )
    _check_format(name, builder)
    features: Any = builder.info.features  # a mapping in every data set of images
    decoders = {key: tfds.decode.SkipDecoding() for key in features if _is_encoded(features[key])}
    try:
        source = builder.as_data_source(split=split, decoders=decoders)
        len(source)  # raises for "train[5:2]"
        return source
    except (ValueError, KeyError) as error:
        splits = ", ".join(builder.info.splits)
        raise ValueError(
            f"split = {split!r} cannot be read from the data set {name!r}; choose from {splits}, "
            f"with slices such as 'train[:90%]' ({_first_line(error)})"
        ) from error


def class_names(source: Records, *, label_key: str | None = None) -> tuple[str, ...]:
    """List the names of the classes by their numbers; empty when the source has no class labels."""
    key = find_features(source, label_key=label_key).label
    info = getattr(source, "dataset_info", None)
    if key is None or info is None or not hasattr(info.features[key], "names"):
        return ()
    return tuple(info.features[key].names)


def find_prepared(content: str | None, data_dir: str | os.PathLike[str] | None) -> str | None:
    """Find the prepared copy of a user's folder by the hash of its content; None without one."""
    root = Path(os.path.expanduser(data_dir or constants.get_default_data_dir()))
    for file in sorted(root.glob("*_folder/*/*/metadata.json")):
        try:
            found = json.loads(file.read_text())["content"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # no whole copy, or one by another version, so it is not the one
        if content is not None and found == content:
            return str(file.parent)
    return None


def _own_builder(name: str, data_dir: str, options: dict[str, Any]) -> tfds.core.DatasetBuilder:
    try:
        return OWN_BUILDERS[name](data_dir=data_dir, **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"options {sorted(options)} do not fit the data set {name!r}: {error}"
        ) from error


def _is_encoded(feature: Any) -> bool:
    """Tell images of bytes from images of floats, which TFDS stores as RGBA and reassembles."""
    dtype: Any = getattr(feature, "np_dtype", None)
    return isinstance(feature, tfds.features.Image) and np.dtype(dtype) != np.float32


def _check_format(name: str, builder: tfds.core.DatasetBuilder) -> None:
    readable = file_adapters.FileFormat.with_random_access()
    found = builder.info.available_file_formats()
    if not found & readable:
        path = Path(builder.data_dir)
        raise ValueError(
            f"the data set {name!r} is prepared at {path} as {', '.join(f.value for f in found)}, "
            "which cannot be read in any order; convert it once, with TensorFlow installed: tfds "
            f"convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
