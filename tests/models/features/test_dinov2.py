"""DINOv2: shapes of every kind of layer; its numbers are compared with PyTorch in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.features import dinov2

WIDTH = 128


def tensors(gated):
    """A network of two layers, by the names of Hugging Face."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + 37 * 37, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    mlp = {"weights_in": (512, WIDTH), "weights_out": (WIDTH, 256)}
    mlp = mlp if gated else {"fc1": (512, WIDTH), "fc2": (WIDTH, 512)}
    for i in range(2):
        at = f"encoder.layer.{i}."
        square = dict.fromkeys(
            [*(f"attention.attention.{n}" for n in ("query", "key", "value")),
             "attention.output.dense"], (WIDTH, WIDTH),
        ) | {f"mlp.{name}": shape for name, shape in mlp.items()}  # fmt: skip
        shapes |= {f"{at}{name}.weight": shape for name, shape in square.items()}
        shapes |= {f"{at}{name}.bias": shape[:1] for name, shape in square.items()}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[at + name] = (WIDTH,)
        shapes |= {f"{at}layer_scale{k}.lambda1": (WIDTH,) for k in (1, 2)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("gated", [False, True])
def test_shapes_fit_together(gated):
    held = tensors(gated)
    params = dinov2.from_tensors(held.__getitem__, held)
    assert len(params["layers"]) == 2 and params["positions"].shape == (1, 257, WIDTH)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(dinov2.features, params, image).shape == (2, WIDTH)


def test_positions_are_interpolated_smoothly():
    """A grid that grows linearly from left to right does so after interpolation, but at edges."""
    held = tensors(False)
    grid = np.broadcast_to(np.arange(37.0)[None, :, None], (37, 37, WIDTH))
    rows = np.concatenate([np.full((1, WIDTH), 5.0), grid.reshape(-1, WIDTH)])
    held["embeddings.position_embeddings"] = rows[None].astype(np.float32)
    found = dinov2.from_tensors(held.__getitem__, held)["positions"][0]
    np.testing.assert_allclose(found[0], 5.0)
    inner = found[1:].reshape(16, 16, WIDTH)[:, 1:-1, 0]
    steps = np.diff(inner, axis=1)
    np.testing.assert_allclose(steps, 37 / 16, atol=0.3)
