"""Fields and inputs of a UNet that do not fit are told with their names and values."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.models.unet.options import (
    check_inputs,
    check_options,
    half_kernels,
    per_level,
)
from diffusion_jax.models.unet.unet import UNet

TRANSFORMER = {"use_spatial_transformer": True, "attention_resolutions": (2,), "num_heads": 4}


def options(**fields):
    return UNet(**{"out_channels": 3, "channel_mult": (1, 2), "num_res_blocks": 1} | fields)


def test_one_value_stands_for_every_level():
    assert per_level(options(num_res_blocks=2), "num_res_blocks") == (2, 2)
    assert per_level(options(num_res_blocks=[1, 3]), "num_res_blocks") == (1, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_resolutions": (1, 2), "num_head_channels": 16},
        TRANSFORMER | {"context_dim": 24, "transformer_depth": (1, 2)},
        TRANSFORMER | {"context_dim": (24, 8), "transformer_depth": 2},
        TRANSFORMER | {"num_heads": -1, "num_head_channels": 24},  # not a divisor: it projects
        {"num_classes": "sequential", "adm_in_channels": 4},
    ],
)
def test_what_fits_passes(fields):
    check_options(options(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"model_channels": 0}, "model_channels = 0 should be at least 1"),
        ({"patch_size": 0}, "patch_size = 0 should be at least 1"),
        ({"num_res_blocks": (1, 2, 3)}, r"num_res_blocks = \(1, 2, 3\) has 3 entries; give 2"),
        ({"transformer_depth": (1,)}, r"transformer_depth = \(1,\) has 1 entries; give 2"),
        ({"disable_self_attentions": (True,)}, "disable_self_attentions = .* has 1 entries"),
        ({"attention_resolutions": (3,)}, r"\(3,\) names no level; .* have \(1, 2\)"),
        ({"attention_resolutions": (2,), "num_heads": 0}, "num_heads = 0 should be at least 1"),
        ({"attention_resolutions": (2,), "num_heads": 7}, "num_heads = 7 does not divide the 64"),
        (
            {"attention_resolutions": (1,), "num_head_channels": 24},
            "num_head_channels = 24 does not divide the 32 channels",
        ),
        (TRANSFORMER | {"num_heads": 7}, "num_heads = 7 does not divide the 64"),
        ({"context_dim": 8}, "context_dim = 8 needs use_spatial_transformer = True"),
        (
            TRANSFORMER | {"context_dim": (8, 4), "transformer_depth": (1, 2)},
            r"so transformer_depth = \(1, 2\) should be 2",
        ),
        ({"num_classes": "sequental"}, "num_classes = 'sequental' is unknown; .* sequential"),
        ({"num_classes": 0}, "num_classes = 0 should be at least 1"),
        ({"num_classes": "sequential"}, "needs adm_in_channels"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_options(options(**fields))


X = jnp.ones((2, 8, 8, 3))
LABELS = jnp.zeros(2, jnp.int32)
CONTEXT = TRANSFORMER | {"context_dim": 24}


@pytest.mark.parametrize(
    ("fields", "x", "context", "y", "message"),
    [
        ({}, jnp.ones((2, 8, 7, 3)), None, None, "x is 8 x 7 pixels; .* multiples of 2"),
        ({"patch_size": 8}, X, None, None, "multiples of 16 .patch_size 8 and 2 levels"),
        (CONTEXT, X, None, None, "context is missing and context_dim = 24"),
        ({}, X, jnp.ones((2, 5, 24)), None, "context is given and context_dim = None"),
        (CONTEXT, X, jnp.ones((2, 5, 23)), None, "context 0 has width 23; context_dim needs 24"),
        (
            TRANSFORMER | {"context_dim": (24, 8), "transformer_depth": 2},
            X, jnp.ones((2, 5, 24)), None,
            r"context_dim = \(24, 8\) differ; give one array per block",
        ),
        ({"num_classes": 3}, X, None, None, "y is missing and num_classes = 3"),
        ({}, X, None, LABELS, r"y \(2,\) is given and num_classes = None"),
        ({"num_classes": 3}, X, None, jnp.ones((2, 3)), r"y has shape \(2, 3\); .* needs \(2,\)"),
        ({"num_classes": 3}, X, None, jnp.ones(2), "y is float32; labels should be integers"),
        (
            {"num_classes": "sequential", "adm_in_channels": 4},
            X, None, jnp.ones((2, 3)), r"y has shape \(2, 3\); .* needs \(2, 4\)",
        ),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(fields, x, context, y, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(options(**fields), x, context, y)


def test_inputs_that_fit_pass():
    check_inputs(options(), X, None, None)
    check_inputs(options(**CONTEXT, num_classes=3), X, jnp.ones((2, 5, 24)), LABELS)
    two = (jnp.ones((2, 5, 24)), jnp.ones((2, 7, 8)))
    depth = TRANSFORMER | {"context_dim": (24, 8), "transformer_depth": 2}
    check_inputs(options(**depth), X, two, None)


def test_kernels_are_rounded_where_the_network_rounds_them_anyway():
    network = UNet(
        out_channels=2, model_channels=8, num_groups=4, channel_mult=(1,), dtype=jnp.bfloat16
    )
    x, t = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), x, t)["params"]
    half = jax.eval_shape(half_kernels, params)
    rounded = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(half)
        if leaf.dtype == jnp.bfloat16
    }
    assert {"time_embed_0/kernel", "input_blocks_1_0/in_layers_2/kernel"} <= rounded
    assert all(name.endswith("/kernel") for name in rounded) and "out_2/kernel" not in rounded
    jaxpr = jax.make_jaxpr(lambda p, x, t: network.apply({"params": p}, x, t))(half, x, t).jaxpr
    kernels = {v for v in jaxpr.invars if v.aval.dtype == jnp.bfloat16}
    converted = [e for e in jaxpr.eqns if e.primitive.name == "convert_element_type"]
    # Nothing takes them back to float32, as a layer that computes in it would.
    assert len(kernels) == len(rounded) and not kernels & {e.invars[0] for e in converted}
