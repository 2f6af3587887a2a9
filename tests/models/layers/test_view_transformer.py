"""The transformer over views and time, against the axes of the original written out one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.basic import timestep_embedding
from diffusion_jax.models.layers.norm import group_norm
from diffusion_jax.models.layers.transformer import BasicTransformerBlock, stack_blocks
from diffusion_jax.models.layers.video_transformer import VideoTransformerBlock
from diffusion_jax.models.layers.view_transformer import ViewTransformer

CLIPS, TIMES, VIEWS, SIDE, WIDTH = 2, 3, 2, 2, 8
FIELDS = {"num_heads": 2, "head_dim": 4, "num_groups": 4, "use_linear": True}
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (CLIPS * TIMES * VIEWS, SIDE, SIDE, WIDTH))
EMB = jax.random.normal(KEYS[1], (CLIPS, TIMES, VIEWS, 6))
CONTEXT = jax.random.normal(KEYS[2], (CLIPS, TIMES, 1, 5))
REFERENCE = jax.random.normal(KEYS[3], (CLIPS, VIEWS, 2 * SIDE, 2 * SIDE, 3))
CASES = {
    "sv4d": {},
    "sv4d2 of 8 views": {"use_camera_emb": True, "separate_motion_merge_factor": True},
    "sv4d2": {
        "use_camera_emb": True,
        "use_3d_attention": True,
        "separate_motion_merge_factor": True,
    },
}


def drawn(module):
    """Parameters without zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, EMB, CONTEXT, REFERENCE)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def compiled(function):
    """Compile with little optimisation: these functions run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(fields, params):
    apply = compiled(ViewTransformer(**FIELDS | fields).apply)
    return apply({"params": params}, X, EMB, CONTEXT, REFERENCE)


def as_written(params, use_camera_emb=False, use_3d_attention=False, **_):
    """The original's reshapes and permutations, a row of context for every row of the blocks."""
    b, t, v, s, c = CLIPS, TIMES, VIEWS, SIDE * SIDE, WIDTH
    heads = {"num_heads": 2, "head_dim": 4}

    def linear(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"].reshape(
            (1,) * (h.ndim - 1) + (-1,)
        )

    def position(name, h):
        return linear(f"{name}_2", jax.nn.silu(linear(f"{name}_0", h)))

    def block(kind, name, h, context):
        return kind(**heads).apply({"params": params[name]}, h, context)

    def over(name, h, count, context):
        """A block over time of the original, on [(b count) s c]."""
        rows = h.shape[1]
        h = h.reshape(-1, count, rows, c).transpose(0, 2, 1, 3).reshape(-1, count, c)
        h = block(VideoTransformerBlock, name, h, context)
        return h.reshape(-1, rows, count, c).transpose(0, 2, 1, 3).reshape(-1, rows, c)

    def mix(name, h, mixed):
        alpha = jax.nn.sigmoid(params[name]["mix_factor"]).reshape((1,) * h.ndim)
        return alpha * h + (1 - alpha) * mixed

    token = CONTEXT[:, :, 0]  # b t d
    spatial_context = jnp.repeat(token[:, :, None], v, 2).reshape(b * t * v, 1, -1)
    camera_context = jnp.repeat(token[:, :, None], s, 2).reshape(b * t * s, 1, -1)
    # Bilinear interpolation to half the sides is the mean of 2 x 2 pixels.
    smaller = REFERENCE.reshape(b * v, SIDE, 2, SIDE, 2, -1).mean((2, 4))
    motion_context = smaller.reshape(b * v * s, 1, -1)
    if use_camera_emb:
        views = position("time_mix_time_embed", EMB[:, 0].reshape(b * v, -1))
    else:
        views = position("time_mix_time_embed", timestep_embedding(jnp.arange(v), c))
        views = jnp.tile(views, (b, 1))
    times = jnp.tile(
        position("time_mix_motion_embed", timestep_embedding(jnp.arange(t), c)), (b, 1)
    )

    gain, bias = (jnp.tile(params["norm"][leaf], (len(X), 1)) for leaf in ("scale", "bias"))
    h = group_norm(X, gain, bias, num_groups=4, epsilon=1e-6).reshape(b * t * v, s, c)
    h = block(BasicTransformerBlock, "transformer_blocks_0", linear("proj_in", h), spatial_context)
    h = h.reshape(b, t, v, s, c)
    if use_3d_attention:
        h = h.transpose(0, 2, 3, 1, 4).reshape(b * v * s, t, c)
        mixed = h + jnp.repeat(views, s, 0)[:, None]
    else:
        h = h.transpose(0, 2, 1, 3, 4).reshape(b * v, t * s, c)
        mixed = h + views[:, None]
    h = mix("time_mixer", h, over("time_mix_blocks_0", mixed, v, camera_context))
    if use_3d_attention:
        h = h.reshape(b, v, s, t, c).transpose(0, 3, 1, 2, 4).reshape(b * t, v * s, c)
    else:
        h = h.reshape(b, v, t, s, c).transpose(0, 2, 1, 3, 4).reshape(b * t, v * s, c)
    motion = "time_mixer_motion" if "time_mixer_motion" in params else "time_mixer"
    moved = over("motion_blocks_0", h + times[:, None], t, motion_context)
    h = mix(motion, h, moved).reshape(b * t * v, s, c)
    return X + linear("proj_out", h).reshape(X.shape)


@pytest.mark.parametrize(
    "name", ["sv4d", pytest.param("sv4d2 of 8 views", marks=pytest.mark.slow), "sv4d2"]
)
def test_axes_are_those_of_the_original(name):
    fields = CASES[name] | {"merge_strategy": "learned_with_images"}
    params = drawn(ViewTransformer(**FIELDS | fields))
    assert ("time_mixer_motion" in params) == (name != "sv4d")
    theirs = compiled(functools.partial(as_written, **fields))(params)
    np.testing.assert_allclose(run(fields, params), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scan_changes_no_numbers():
    fields = {"depth": 2, "merge_strategy": "learned"}
    params = drawn(ViewTransformer(**FIELDS | fields))
    stacked = stack_blocks(params)
    assert stacked["motion_blocks"]["attn1"]["to_q"]["kernel"].shape == (2, 8, 8)
    ours = run(fields | {"scan": True, "remat": True}, stacked)
    np.testing.assert_allclose(ours, run(fields, params), rtol=1e-4, atol=1e-4)
