"""Inception-v3: names and shapes; its numbers are compared with PyTorch in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.models.features import inception


def zeros(name):
    """Tensors of the right rank; names that pytorch-fid does not have are an error of the test."""
    if name.endswith("conv.weight"):
        return np.zeros(SHAPES[name.removesuffix(".conv.weight")], np.float32)
    if name.startswith("fc"):
        return np.zeros((1008, 2048) if name.endswith("weight") else 1008, np.float32)
    return np.ones(SHAPES[name.split(".bn.")[0]][0], np.float32)


# Some shapes of pt_inception-2015-12-05-6726825d.pth, [o, c, h, w]; the others follow from them.
KNOWN = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
    "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
    "Mixed_6b.branch7x7dbl_2": (128, 128, 7, 1),
    "Mixed_6e.branch7x7_3": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1),
}


def all_shapes():
    def a(c, pool):
        return [(64, c, 1, 1), (48, c, 1, 1), (64, 48, 5, 5), (64, c, 1, 1), (96, 64, 3, 3),
                (96, 96, 3, 3), (pool, c, 1, 1)]  # fmt: skip

    def c(n):
        one, other = (1, 7), (7, 1)
        return [(192, 768, 1, 1), (n, 768, 1, 1), (n, n, *one), (192, n, *other), (n, 768, 1, 1),
                (n, n, *other), (n, n, *one), (n, n, *other), (192, n, *one),
                (192, 768, 1, 1)]  # fmt: skip

    def e(n):
        return [(320, n, 1, 1), (384, n, 1, 1), (384, 384, 1, 3), (384, 384, 3, 1), (448, n, 1, 1),
                (384, 448, 3, 3), (384, 384, 1, 3), (384, 384, 3, 1), (192, n, 1, 1)]  # fmt: skip

    stem = [(32, 3, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (80, 64, 1, 1), (192, 80, 3, 3)]
    b = [(384, 288, 3, 3), (64, 288, 1, 1), (96, 64, 3, 3), (96, 96, 3, 3)]
    d = [(192, 768, 1, 1), (320, 192, 3, 3), (192, 768, 1, 1), (192, 192, 1, 7), (192, 192, 7, 1),
         (192, 192, 3, 3)]  # fmt: skip
    widths = (*a(192, 32), *a(256, 64), *a(288, 64), *b, *c(128), *c(160), *c(160), *c(192), *d)
    names = inception.conv_names()
    return dict(zip(names, [*stem, *widths, *e(1280), *e(2048)], strict=True))


SHAPES = all_shapes()


def test_names_and_shapes_fit_together():
    assert len(SHAPES) == 94 and {name: SHAPES[name] for name in KNOWN} == KNOWN
    params = inception.from_tensors(zeros)
    image = jax.ShapeDtypeStruct((2, 32, 40, 3), jnp.float32)
    pooled = jax.eval_shape(inception.features, params, image)
    assert pooled.shape == (2, inception.WIDTH)
    assert jax.eval_shape(inception.logits, params, pooled).shape == (2, inception.CLASSES)
