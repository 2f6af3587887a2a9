"""Names of layers in LoRA files: which network they mean, and which layers here they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.lora import Factors, merge_lora, read_lora, write_lora
from diffusion_jax.convert.weights.lora_names import (
    Place,
    Spot,
    names_of,
    places_of,
    plain_name,
    prefix_of,
    role_of,
)
from diffusion_jax.convert.weights.names import Part
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.models.dit import DiT

WIDTH = 16


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def dit(*, scan):
    module = DiT(4, WIDTH, depth=2, num_heads=2, context_dim=6, num_classes=3, scan=scan)
    inputs = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,)), jnp.zeros((1, 3, 6)), jnp.zeros((1,), int)
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
    return {"network": shapes}


def spot(layer, block, *, scan):
    path = f"blocks/{layer}/kernel" if scan else f"blocks_{block}/{layer}/kernel"
    return Spot("network", Part(path, block if scan else None))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("unet.mid_block.attentions.0.proj_in", ("network", "mid_block_attentions_0_proj_in")),
        ("lora_unet_down_blocks_0_resnets_0_conv1", ("network", "down_blocks_0_resnets_0_conv1")),
        ("text_encoder_2.text_model.encoder.layers.1.mlp", ("text_2", "encoder_layers_1_mlp")),
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", ("text", "encoder_layers_1_mlp_fc1")),
        ("transformer.transformer_blocks.0.ff.net.2", ("network", "transformer_blocks_0_ff_net_2")),
        ("transformer_blocks.0.ff.net.2", ("network", "transformer_blocks_0_ff_net_2")),
        ("base_model.model.blocks.0.attn.qkv", ("network", "blocks_0_attn_qkv")),
        ("transformer.proj_out_1", ("network", "proj_out_1")),
        ("vae.encoder.conv_in", ("", "vae_encoder_conv_in")),
    ],
)
def test_the_start_of_a_name_says_which_network_is_meant(module, expected):
    assert plain_name(module) == expected


def test_the_end_of_a_name_says_what_a_tensor_is():
    assert role_of("unet.a.lora_A.weight") == ("down", "unet.a")
    assert role_of("unet.a.lora_B.default.weight") == ("up", "unet.a")
    assert role_of("lora_unet_a.dora_scale") == ("magnitude", "lora_unet_a")
    assert role_of("unet.a.weight") == (None, "unet.a.weight")


@pytest.mark.parametrize("scan", [False, True])
def test_a_transformer_has_the_names_of_diffusers(scan):
    trees = dit(scan=scan)
    names, block = names_of(trees, "peft"), "transformer.transformer_blocks.1"
    assert prefix_of("network", trees["network"]) == "transformer"
    assert names[spot("attn_qkv", 1, scan=scan)] == (
        f"{block}.attn1.to_q",
        f"{block}.attn1.to_k",
        f"{block}.attn1.to_v",
    )
    for layer, name in (
        ("attn_proj", "attn1.to_out.0"),
        ("cross_attn/to_k", "attn2.to_k"),
        ("cross_attn/to_out_0", "attn2.to_out.0"),
        ("mlp_fc1", "ff.net.0.proj"),
        ("mlp_fc2", "ff.net.2"),
        ("adaLN_modulation_1", "norm1.linear"),
    ):
        assert names[spot(layer, 1, scan=scan)] == (f"{block}.{name}",)
    rest = {s.part.path: name for s, (name, *_) in names.items() if "blocks" not in s.part.path}
    assert rest == {
        "x_embedder_proj/kernel": "transformer.pos_embed.proj",
        "final_layer_adaLN_modulation_1/kernel": "transformer.proj_out_1",
        "final_layer_linear/kernel": "transformer.proj_out_2",
    }
    assert names_of(trees, "kohya") == {}
    places, fused = places_of(trees), spot("attn_qkv", 1, scan=scan)
    assert places["network", "transformer_blocks_1_attn1_to_v"] == Place(fused, 2, 3)
    assert places["network", "blocks_1_attn_qkv"] == Place(fused)


def lora_of(*, scan, magnitude=False):
    sizes = {"attn_qkv": (WIDTH, 3 * WIDTH), "mlp_fc2": (4 * WIDTH, WIDTH)}
    return {
        spot(layer, 1, scan=scan): Factors(
            normal(1, inputs, 2),
            normal(2, 2, outputs),
            2.0,
            np.abs(normal(3, outputs)) if magnitude else None,
        )
        for layer, (inputs, outputs) in sizes.items()
    }


@pytest.mark.parametrize(("scan", "magnitude"), [(False, False), (True, True)])
def test_queries_keys_and_values_are_split_and_joined_bit_by_bit(tmp_path, scan, magnitude):
    trees, lora = dit(scan=scan), lora_of(scan=scan, magnitude=magnitude)
    path = tmp_path / "x.safetensors"
    write_lora(lora, path, trees, "peft")
    tensors = open_weights(path).tensors
    assert len(tensors) == (3 if magnitude else 2) * 4
    key = tensors["transformer.transformer_blocks.1.attn1.to_k.lora_B.weight"].load()
    fused = lora[spot("attn_qkv", 1, scan=scan)]
    np.testing.assert_array_equal(key, fused.up[:, WIDTH : 2 * WIDTH].T)
    found = read_lora(path, trees)
    assert found.keys() == lora.keys()
    for own, factors in lora.items():
        for ours, theirs in zip(found[own], factors, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_layers_of_one_that_were_trained_alone_change_it_as_they_did(tmp_path):
    """Queries and values of other ranks and no keys: the ranks add up, the keys stay."""
    trees, block = dit(scan=False), "transformer.transformer_blocks.1.attn1"
    tensors = {}
    for seed, (part, rank) in enumerate({"to_q": 2, "to_v": 3}.items()):
        tensors[f"{block}.{part}.lora_A.weight"] = normal(seed, rank, WIDTH)
        tensors[f"{block}.{part}.lora_B.weight"] = normal(seed + 5, WIDTH, rank)
    said = '{"transformer.r": 2, "transformer.lora_alpha": 1}'
    save_weights(tmp_path / "x.safetensors", [], tensors, {"lora_adapter_metadata": said})
    values = jax.tree.map(lambda leaf: normal(9, *leaf.shape), trees)
    lora = read_lora(tmp_path / "x.safetensors", trees)
    assert [factors.down.shape[-1] for factors in lora.values()] == [5]
    found, own = (
        np.asarray(tree["network"]["blocks_1"]["attn_qkv"]["kernel"])
        for tree in (merge_lora(values, lora), values)
    )
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        columns = slice(number * WIDTH, (number + 1) * WIDTH)
        expected = own[:, columns]
        if part != "to_k":
            down, up = (tensors[f"{block}.{part}.lora_{x}.weight"] for x in "AB")
            expected = expected + 0.5 * (up @ down).T
        np.testing.assert_allclose(found[:, columns], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("attn1.to_k.lora_magnitude_vector", "1 is missing: a magnitude of blocks_1/attn_qkv"),
        ("attn1.to_x.lora_A.weight", "1 is of no layer here: transformer.*to_x"),
    ],
)
def test_what_does_not_fit_a_transformer_is_told(tmp_path, extra, message):
    trees, path = dit(scan=False), tmp_path / "x.safetensors"
    write_lora(lora_of(scan=False), path, trees, "peft")
    tensors = {name: tensor.load() for name, tensor in open_weights(path).tensors.items()}
    tensors[f"transformer.transformer_blocks.1.{extra}"] = np.ones(WIDTH, np.float32)
    save_weights(tmp_path / "y.safetensors", [], tensors)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "y.safetensors", trees)
    with pytest.raises(ValueError, match="layers have no names in the layout kohya: network/bl"):
        write_lora(lora_of(scan=False), tmp_path / "z.safetensors", trees, "kohya")
