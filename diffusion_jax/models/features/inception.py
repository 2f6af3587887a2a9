"""The Inception-v3 of the FID: [b h w 3] -> pooled features [b 2048] and class logits [b 1008].

It is the network of TensorFlow's 2015 release, which differs from the published one in its average
poolings (padding does not count) and in one branch that takes a maximum. Parameters are
{"Mixed_5b.branch1x1": layer, ...}, and "fc": kernel [2048 1008] and bias, by the names of
pytorch-fid and torch-fidelity.
Source: Szegedy et al. 2016; Heusel et al. 2017.
"""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.models.features.layers import conv, folded, resize_tf1
from diffusion_jax.types import PyTree

NAME, WIDTH, SIZE, CLASSES = "inception", 2048, 299, 1008

_STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3".split()
_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 "
    "branch7x7dbl_4 branch7x7dbl_5 branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 "
    "branch3x3dbl_3a branch3x3dbl_3b branch_pool"
)
BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E),
}


def features(params: PyTree, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """Compute the pooled features of images with values in [0, 255]."""
    x = (resize_tf1(images, SIZE) - 128.0) / 128.0

    def run(x: Array, *names: str, stride: int = 1, padding: str = "SAME") -> Array:
        """Apply convolutions with ReLU; stride and padding are for the last one."""
        *first, last = names
        for name in first:
            x = jax.nn.relu(conv(x, params[name]))
        return jax.nn.relu(conv(x, params[last], stride=stride, padding=padding))

    x = run(x, "Conv2d_1a_3x3", stride=2, padding="VALID")
    x = run(x, "Conv2d_2a_3x3", padding="VALID")
    x = _max(run(x, "Conv2d_2b_3x3"))
    x = run(x, "Conv2d_3b_1x1", padding="VALID")
    x = _max(run(x, "Conv2d_4a_3x3", padding="VALID"))
    for block, names in BLOCKS.items():
        at = lambda names, block=block: [f"{block}.{name}" for name in names.split()]  # noqa: E731
        x = _block(names)(x, run, at)
    return jnp.mean(x, (1, 2))


def logits(params: PyTree, pooled: Float[Array, "b 2048"]) -> Float[Array, "b 1008"]:
    """Compute the class logits of pooled features without the bias, as Inception Scores do."""
    return pooled @ params["fc"]["kernel"]


def from_tensors(tensor: Callable[[str], np.ndarray]) -> PyTree:
    """Build the parameters from tensors by the names of pytorch-fid and torch-fidelity.

    tensor: name -> array; it raises where there is none.
    """
    params: dict[str, dict[str, np.ndarray]] = {}
    for name in conv_names():
        kernel = tensor(f"{name}.conv.weight").transpose(2, 3, 1, 0)
        stored = (tensor(f"{name}.bn.{part}") for part in ("running_mean", "running_var", "bias"))
        params[name] = folded(kernel, *stored, scale=tensor(f"{name}.bn.weight"))
    params["fc"] = {"kernel": tensor("fc.weight").T, "bias": tensor("fc.bias")}
    return params


def conv_names() -> Iterable[str]:
    """List the names of all convolutions."""
    inside = [f"{block}.{name}" for block, names in BLOCKS.items() for name in names.split()]
    return [*_STEM, *inside]


Run = Callable[..., Array]
At = Callable[[str], list[str]]


def _block(names: str) -> Callable[[Array, Run, At], Array]:
    return {_A: _block_a, _B: _block_b, _C: _block_c, _D: _block_d, _E: _block_e}[names]


def _block_a(x: Array, run: Run, at: At) -> Array:
    return _join(
        run(x, *at("branch1x1")),
        run(x, *at("branch5x5_1 branch5x5_2")),
        run(x, *at("branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")),
        run(_mean(x), *at("branch_pool")),
    )


def _block_b(x: Array, run: Run, at: At) -> Array:
    double = at("branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
    return _join(
        run(x, *at("branch3x3"), stride=2, padding="VALID"),
        run(x, *double, stride=2, padding="VALID"),
        _max(x),
    )


def _block_c(x: Array, run: Run, at: At) -> Array:
    return _join(
        run(x, *at("branch1x1")),
        run(x, *at("branch7x7_1 branch7x7_2 branch7x7_3")),
        run(x, *at(" ".join(f"branch7x7dbl_{i}" for i in range(1, 6)))),
        run(_mean(x), *at("branch_pool")),
    )


def _block_d(x: Array, run: Run, at: At) -> Array:
    seven = at(" ".join(f"branch7x7x3_{i}" for i in range(1, 5)))
    return _join(
        run(x, *at("branch3x3_1 branch3x3_2"), stride=2, padding="VALID"),
        run(x, *seven, stride=2, padding="VALID"),
        _max(x),
    )


def _block_e(x: Array, run: Run, at: At) -> Array:
    three, double = run(x, *at("branch3x3_1")), run(x, *at("branch3x3dbl_1 branch3x3dbl_2"))
    is_last = at("branch_pool")[0].startswith("Mixed_7c")
    pooled = _max(x, stride=1, padding="SAME") if is_last else _mean(x)
    return _join(
        run(x, *at("branch1x1")),
        *(run(three, name) for name in at("branch3x3_2a branch3x3_2b")),
        *(run(double, name) for name in at("branch3x3dbl_3a branch3x3dbl_3b")),
        run(pooled, *at("branch_pool")),
    )


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def _max(x: Array, *, stride: int = 2, padding: str = "VALID") -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
