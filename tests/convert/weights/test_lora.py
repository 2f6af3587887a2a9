"""LoRA files: names in both layouts, what is written is read, what does not fit is told."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.lora import (
    Factors,
    extract_lora,
    merge_lora,
    read_lora,
    write_lora,
)
from diffusion_jax.convert.weights.lora_names import Spot
from diffusion_jax.convert.weights.names import Part
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.models.conditioning.clip import ClipTextTower
from diffusion_jax.models.unet.unet import UNet

STACK = "input_blocks_3_1/transformer_blocks/attn1/to_q/kernel"
CONV = "input_blocks_1_0/in_layers_2/kernel"
TEXT = "encoder/layers_1/self_attn/q_proj/kernel"


def normal(seed, *shape, dtype=np.float32):
    return np.random.RandomState(seed).standard_normal(shape).astype(dtype)


@pytest.fixture(scope="module")
def trees():
    """The shapes of a small SDXL, whose deep transformer is scanned."""
    unet = UNet(
        out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(2,), num_head_channels=16, use_spatial_transformer=True,
        use_linear_in_transformer=True, transformer_depth=(1, 2), context_dim=24, scan=True,
    )  # fmt: skip
    text = ClipTextTower(width=8, num_layers=2, num_heads=2, mlp_dim=8, vocab_size=9, max_length=4)
    tokens = jnp.zeros((1, 4), jnp.int32)
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), jnp.zeros((1, 4, 24))
    network = jax.eval_shape(lambda key: unet.init(key, *inputs)["params"], jax.random.key(0))
    texts = jax.eval_shape(lambda key: text.init(key, tokens)["params"], jax.random.key(0))
    return {"network": network, "text": texts, "text_2": texts}


def lora_of(trees, *, magnitude=False, alpha=1.0, dtype=np.float32):
    """A LoRA of one block of a stack, a convolution and both text encoders, of several ranks."""
    spots = [
        (Spot("network", Part(STACK, 1)), (64,), 64, 3),
        (Spot("network", Part(CONV, None)), (3, 3, 32), 32, 2),
        (Spot("text", Part(TEXT, None)), (8,), 8, 4),
        (Spot("text_2", Part(TEXT, None)), (8,), 8, 4),
    ]
    return {
        spot: Factors(
            normal(i, *inputs, rank, dtype=dtype),
            normal(i + 9, rank, outputs, dtype=dtype),
            alpha * rank,
            np.abs(normal(i, outputs, dtype=dtype)) if magnitude else None,
        )
        for i, (spot, inputs, outputs, rank) in enumerate(spots)
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for spot, factors in expected.items():
        for ours, theirs in zip(found[spot], factors, strict=True):
            np.testing.assert_array_equal(ours, theirs)


NAMES = {
    "peft": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight",
        "unet.down_blocks.0.resnets.0.conv1.lora_B.weight",
        "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "kohya": (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight",
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
    ),
}


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("layout", NAMES)
def test_what_is_written_is_read_bit_by_bit(trees, layout, magnitude, tmp_path):
    lora = lora_of(trees, magnitude=magnitude, alpha=1.0 if layout == "peft" else 0.5)
    write_lora(lora, tmp_path / "a.safetensors", trees, layout)
    tensors = open_weights(tmp_path / "a.safetensors").tensors
    shapes = [tensors[name].shape for name in NAMES[layout]]
    assert shapes == [(3, 64), (32, 2, 1, 1), (4, 8)]
    read = read_lora(tmp_path / "a.safetensors", trees)
    same(read, lora)
    write_lora(read, tmp_path / "b.safetensors", trees, layout)
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"]
    assert contents[0] == contents[1]


def test_both_layouts_say_the_same_where_alpha_is_a_power_of_two(trees, tmp_path):
    """PEFT's files have no alphas: a scale of 1/2 goes into `up`, and halves are exact."""
    lora = lora_of(trees, alpha=0.5, dtype=np.float16)
    write_lora(lora, tmp_path / "x.safetensors", trees, "peft")
    found = read_lora(tmp_path / "x.safetensors", trees)
    for spot, factors in lora.items():
        assert found[spot].scale == 1.0 and found[spot].up.dtype == np.float16
        np.testing.assert_array_equal(found[spot].up, factors.up * np.float16(0.5))


def test_kohya_names_the_networks_of_other_models_as_diffusers_does(trees, tmp_path):
    sd1 = {slot: trees[slot] for slot in ("network", "text")}
    lora = {spot: factors for spot, factors in lora_of(trees).items() if spot.slot in sd1}
    write_lora(lora, tmp_path / "x.safetensors", sd1, "kohya")
    weights = open_weights(tmp_path / "x.safetensors")
    modules = {name.partition(".")[0] for name in weights.tensors}
    assert modules == {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
    }
    said = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4"}
    assert dict(weights.metadata).items() >= said.items()
    same(read_lora(tmp_path / "x.safetensors", trees), lora)  # an SDXL may have these names, too


def test_the_layers_of_lcm_lora_have_a_place(trees, tmp_path):
    """It changes convolutions, resampling, embeddings and both ends, under diffusers' names."""
    block = "down_blocks_1_attentions_0_transformer_blocks_1"
    modules = {  # sides of the kernel, inputs and outputs
        "conv_in": (3, 3, 4, 32),
        "time_embedding_linear_1": (32, 128),
        "down_blocks_0_resnets_0_conv1": (3, 3, 32, 32),
        "down_blocks_0_resnets_0_time_emb_proj": (128, 32),
        "down_blocks_0_downsamplers_0_conv": (3, 3, 32, 32),
        "down_blocks_1_resnets_0_conv_shortcut": (1, 1, 32, 64),
        "down_blocks_1_attentions_0_proj_in": (64, 64),
        f"{block}_attn1_to_out_0": (64, 64),
        f"{block}_attn2_to_k": (24, 64),
        f"{block}_ff_net_0_proj": (64, 512),
        f"{block}_ff_net_2": (256, 64),
        "mid_block_resnets_1_conv2": (3, 3, 64, 64),
        "up_blocks_0_upsamplers_0_conv": (3, 3, 64, 64),
        "conv_out": (3, 3, 32, 4),
    }
    tensors = {}
    for name, (*sides, inputs, outputs) in modules.items():
        ones = [1] * len(sides)
        tensors[f"lora_unet_{name}.lora_down.weight"] = normal(1, 2, inputs, *sides)
        tensors[f"lora_unet_{name}.lora_up.weight"] = normal(2, outputs, 2, *ones)
        tensors[f"lora_unet_{name}.alpha"] = np.float32(1.0)
    path = tmp_path / "lcm.safetensors"
    save_weights(path, [], tensors, {})
    found = read_lora(path, trees)
    shapes = sorted((*f.down.shape[:-1], f.up.shape[-1]) for f in found.values())
    assert shapes == sorted(tuple(shape) for shape in modules.values())


def test_scales_that_diffusers_keeps_in_words_are_heeded(trees, tmp_path):
    said = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"conv1": 1},
            "unet.rank_pattern": {"conv1": 2}}  # fmt: skip
    lora = lora_of(trees)
    write_lora(lora, tmp_path / "a.safetensors", trees, "peft")
    tensors = {n: t.load() for n, t in open_weights(tmp_path / "a.safetensors").tensors.items()}
    path = tmp_path / "b.safetensors"
    save_weights(path, [], tensors, {"lora_adapter_metadata": json.dumps(said)})
    scales = [factors.scale for factors in read_lora(path, trees).values()]
    assert sorted(scales) == [0.5, 1.0, 1.0, 2.0]


def test_a_lora_is_added_to_the_kernels_it_is_for(trees):
    values = jax.tree.map(lambda leaf: normal(1, *leaf.shape), trees)
    lora = lora_of(trees, alpha=0.5)
    merged = merge_lora(values, lora, 0.8)
    stack, own = merged["network"]["input_blocks_3_1"], values["network"]["input_blocks_3_1"]
    query, before = (t["transformer_blocks"]["attn1"]["to_q"]["kernel"] for t in (stack, own))
    down, up, *_ = lora[Spot("network", Part(STACK, 1))]
    np.testing.assert_array_equal(query[0], before[0])
    np.testing.assert_allclose(query[1], before[1] + 0.8 * 0.5 * (down @ up), rtol=1e-4, atol=1e-5)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), merged, values)
    assert sum(jax.tree.leaves(changed)) == len(lora)
    twice = merge_lora(merged, lora_of(trees), -0.4)
    np.testing.assert_allclose(
        twice["text"]["encoder"]["layers_1"]["self_attn"]["q_proj"]["kernel"],
        values["text"]["encoder"]["layers_1"]["self_attn"]["q_proj"]["kernel"],
        atol=1e-5,
    )


def test_dora_gives_columns_the_norms_of_the_file(trees):
    values = jax.tree.map(lambda leaf: normal(1, *leaf.shape), trees)
    lora = lora_of(trees, magnitude=True)
    for weight, share in ((1.0, 1.0), (0.0, 0.0)):
        merged = merge_lora(values, lora, weight)
        kernel = merged["network"]["input_blocks_1_0"]["in_layers_2"]["kernel"]
        norms = np.sqrt((np.asarray(kernel) ** 2).sum((0, 1, 2)))
        own = values["network"]["input_blocks_1_0"]["in_layers_2"]["kernel"]
        before = np.sqrt((own**2).sum((0, 1, 2)))
        magnitude = lora[Spot("network", Part(CONV, None))].magnitude
        np.testing.assert_allclose(norms, magnitude if share else before, rtol=1e-4)


def test_a_change_of_low_rank_is_extracted_whole(trees):
    values = jax.tree.map(lambda leaf: normal(1, *leaf.shape), trees)
    lora = lora_of(trees)
    merged = merge_lora(values, lora)
    found = extract_lora(values, merged, {spot: 4 for spot in lora})
    for spot, factors in lora.items():
        ours, theirs = (f.down @ f.up for f in (found[spot], factors))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({f"{Q}.lora_A.weight": (2, 64)}, f"1 is missing: up of {Q}"),
        (PAIR | {f"{Q}.hada_w1_a": (2, 64)}, f"1 is of no layer here: {Q}.hada_w1_a"),
        (PAIR | {"unet.mid_block.attentions.7.to_q.lora_A.weight": (2, 64)}, "1 is of no layer"),
        (
            PAIR | {f"{Q}.lora_B.weight": (65, 2)},
            "1 is of another shape: unet.mid_block.*(64, 64)",
        ),
        (PAIR | {f"{Q}.lora_A.weight": (0, 64)}, "1 is of another shape"),
        (PAIR | {f"{Q}.lora_A.weight": (2, 64, 3, 3)}, "1 is of another shape"),
        (PAIR | {f"{Q}.lora_B.weight": (2,)}, "1 is of another shape"),
        (PAIR | {f"{Q}.lora_magnitude_vector": (63,)}, "magnitude (63,) ((64,) here)"),
        (PAIR | {"text_encoder.x.lora_A.weight": (2, 8)}, "1 is of no layer here: text_encoder.x"),
        ({"model.diffusion_model.out.2.bias": (4,)}, "1 is of no layer here: model.diffusion_m"),
    ],
)
def test_a_lora_of_another_model_is_refused_in_one_sentence(trees, shapes, message, tmp_path):
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_weights(tmp_path / "x.safetensors", [], tensors)
    parts = map(re.escape, message.split(".*"))
    with pytest.raises(ValueError, match=f"does not fit the networks here: .*{'.*'.join(parts)}"):
        read_lora(tmp_path / "x.safetensors", trees)


def test_numbers_that_are_no_numbers_are_refused(trees, tmp_path):
    tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in PAIR.items()}
    save_weights(tmp_path / "x.safetensors", [], tensors)
    with pytest.raises(ValueError, match="2 hold NaN or infinite numbers"):
        read_lora(tmp_path / "x.safetensors", trees)


def test_layers_without_a_name_are_told_and_nothing_is_written(trees, tmp_path):
    unet = UNet(out_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
                attention_resolutions=(1,), num_heads=2)  # fmt: skip
    inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros((1,))
    network = jax.eval_shape(lambda key: unet.init(key, *inputs)["params"], jax.random.key(0))
    spot = Spot("network", Part("middle_block_1/qkv/kernel", None))
    lora = {spot: Factors(normal(0, 1, 32, 2), normal(1, 2, 96), 2.0)}
    with pytest.raises(ValueError, match="1 layer has no names in the layout peft: network/midd"):
        write_lora(lora, tmp_path / "x.safetensors", {"network": network}, "peft")
    assert not [*tmp_path.iterdir()]
