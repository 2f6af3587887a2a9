"""What the sections of a model and its conditioning make, and what they may not say."""

import jax
import jax.numpy as jnp
import pytest
from support.conditioned import ROWS, UNET
from support.experiments import built

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.building import build_network


def test_labels_need_a_row_for_the_null_class():
    conditioning = dict(key="adm", embedders={"label": dict(name="class_label", num_classes=4)})
    with pytest.raises(ConfigError, match=r"config\.model\.num_classes = 4 should be 5"):
        build_network(UNET | dict(num_classes=4), conditioning, (8, 8, 1))


ALL = dict(
    key="crossattn-adm",
    embedders={
        "words": ROWS["crossattn"][1],
        "more": ROWS["crossattn"][1] | dict(embed_dim=3, input_key="more"),
        "kind": ROWS["vector"][1],
        "size": dict(name="numbers", input_key="target_size", outdim=4),
    },
)
DERIVED = ("out_channels", "context_dim", "num_classes", "adm_in_channels")


def test_fields_follow_from_the_data_and_the_embedders():
    model = {key: value for key, value in UNET.items() if key != "out_channels"}
    model |= dict(use_spatial_transformer=True)
    module = build_network(model, ALL, (8, 8, 3)).module
    # The widths of what is joined, by hand: 6 + 3 as context, 5 + 2 * 4 as vector.
    values = (3, 9, "sequential", 13)
    assert tuple(getattr(module, name) for name in DERIVED) == values
    given = model | dict(zip(DERIVED, values, strict=True)) | dict(context_dim=(9,))
    assert build_network(given, ALL, (8, 8, 3)).module.context_dim == (9,)
    label = dict(key="adm", embedders={"label": dict(name="class_label", num_classes=4)})
    assert build_network(UNET, label, (8, 8, 1)).module.num_classes == 5
    plain = build_network(UNET, None, (8, 8, 1)).module
    assert (plain.num_classes, plain.context_dim, plain.adm_in_channels) == (None, None, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "out_channels",
            1,
            r"out_channels = 1 should be 3, the channels of the images \(config\.da",
        ),
        ("context_dim", 6, r"context_dim = 6 should be 9, the width .*; or leave it out"),
        ("context_dim", (9, 8), r"context_dim = \(9, 8\) should be 9"),
        (
            "num_classes",
            5,
            r"num_classes = 5 should be 'sequential', as the embedders give vectors",
        ),
        ("adm_in_channels", 12, r"config\.model\.adm_in_channels = 12 should be 13"),
    ],
)
def test_a_given_field_is_checked(field, value, message):
    model = UNET | dict(use_spatial_transformer=True, out_channels=3) | {field: value}
    with pytest.raises(ConfigError, match=message):
        build_network(model, ALL, (8, 8, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_is_for_computing_and_parameters_stay_float32(dtype):
    network = build_network(UNET | dict(dtype=dtype), {}, (8, 8, 1))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    assert network.module.dtype == jnp.dtype(dtype)


def test_unknown_dtype_lists_the_choices():
    with pytest.raises(ConfigError, match=r"config\.model\.dtype = 'bf16' is unknown.*bfloat16"):
        build_network(UNET | dict(dtype="bf16"), {}, (8, 8, 1))


@pytest.mark.parametrize(
    ("config", "order"),
    [  # generative-models: the emb_models of sd_xl_base, sd_xl_refiner, svd and sv4d, by input
        ("sdxl", "caption caption original_size crop_top_left target_size"),
        ("sdxl_refiner", "caption original_size crop_top_left aesthetic_score"),
        ("svd", "cond_frames_without_noise fps_id motion_bucket_id cond_frames cond_aug"),
        ("sv3d", "cond_frames_without_noise cond_frames cond_aug"),
        ("sv4d", "cond_frames_without_noise cond_frames polar_rad azimuth_rad cond_view "
                 "cond_motion"),
    ],
)  # fmt: skip
def test_features_are_joined_in_the_order_of_the_released_weights(config, order):
    """A ConfigDict sorts its keys, and what it was made from is forgotten."""
    network = built(f"configs/{config}.py:tiny").network
    keys = [e.input_key if e.text is None else e.text.source for e in network.embedders.values()]
    assert keys == order.split()


def test_an_order_names_each_embedder_once():
    embedders = {"b": dict(name="numbers", input_key="b"), "a": dict(name="numbers", input_key="a")}
    for order in (("a",), ("a", "b", "b"), ("a", "c")):
        with pytest.raises(ConfigError, match="order = .* should name each embedder once"):
            section = dict(key="adm", embedders=embedders, order=order)
            build_network(UNET, section, (8, 8, 1))
