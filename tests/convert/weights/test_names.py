"""The names of released files, for whole networks and by examples."""

import lzma
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.names import NAME_MAPS, Part, file_tensors, to_file, to_ours

FAMILIES = ("sd1_v1-inference", "sd21", "sdxl_base", "sdxl_refiner")


@pytest.mark.parametrize("name", FAMILIES)
def test_unets_have_the_released_names_and_shapes(name, released):
    tree, names = released
    for scan in (False, True) if name == "sdxl_base" else (False,):
        ours = file_tensors(tree(name, scan=scan), "unet_ldm")
        assert {tensor.name: tensor.shape for tensor in ours} == names[name]


def named(tree, name_map):
    return {tensor.name: tensor for tensor in file_tensors(tree, name_map)}


def diffusers_names():
    """What diffusers and transformers call the same: {network: {name: shape}}."""
    text = lzma.decompress((Path(__file__).parents[1] / "data/diffusers_names.xz").read_bytes())
    networks = {}
    for line in text.decode().splitlines():
        name, last = line.split()
        if name == "#":
            current = networks[last] = {}
        else:
            current[name] = tuple(int(side) for side in last.split("x"))
    return networks


@pytest.mark.parametrize("name", ["sd1_v1-inference", "sdxl_base"])
def test_unets_have_the_names_and_shapes_of_diffusers(name, released):
    tree, _ = released
    ours = file_tensors(tree(name), "unet_diffusers")
    assert {tensor.name: tensor.shape for tensor in ours} == diffusers_names()[name]


def test_vae_names(vae):
    ldm, diffusers = named(vae(), "vae_ldm"), named(vae(), "vae_diffusers")
    down, ours = "encoder.down_blocks.1", "encoder.down.1"
    pairs = {
        "encoder.down.0.block.0.nin_shortcut.weight": None,
        f"{ours}.block.0.nin_shortcut.weight": f"{down}.resnets.0.conv_shortcut.weight",
        f"{ours}.attn.0.norm.weight": f"{down}.attentions.0.group_norm.weight",
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.mid.block_1.conv2.weight": "encoder.mid_block.resnets.0.conv2.weight",
        "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.up.0.block.1.norm1.weight": "decoder.up_blocks.1.resnets.1.norm1.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "quant_conv.weight": "quant_conv.weight",
    }
    places = {tensor.parts: name for name, tensor in diffusers.items()}
    for name, theirs in pairs.items():
        assert (name in ldm) == (theirs is not None), name
        if theirs:
            assert places[ldm[name].parts] == theirs
    assert ldm["decoder.mid.attn_1.k.weight"].shape == (64, 64, 1, 1)
    assert diffusers["decoder.mid_block.attentions.0.to_k.weight"].shape == (64, 64)
    assert "decoder.mid_block.attentions.0.key.weight" in (
        diffusers["decoder.mid_block.attentions.0.to_k.weight"].aliases
    )
    assert len(ldm) == len(diffusers) == len(jax.tree.leaves(vae()))


def test_the_kl_f8_autoencoder_has_the_released_counts():
    """106 and 138 tensors and 34,163,592 and 49,490,179 numbers, and 4 and 92 in between."""
    from diffusion_jax.models.first_stage.autoencoder import Autoencoder

    image = jnp.ones((1, 32, 32, 3))
    tree = jax.eval_shape(lambda key: Autoencoder().init(key, image)["params"], jax.random.key(0))
    names = {t.name: t.shape for t in file_tensors(tree, "vae_ldm")}
    for part, tensors, numbers in (("encoder.", 106, 34_163_592), ("decoder.", 138, 49_490_179)):
        sizes = [np.prod(shape) for name, shape in names.items() if name.startswith(part)]
        assert (len(sizes), sum(sizes)) == (tensors, numbers)
    assert names["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert names["quant_conv.weight"] == (8, 8, 1, 1)
    assert names["post_quant_conv.weight"] == (4, 4, 1, 1)
    theirs = {t.name: t.shape for t in file_tensors(tree, "vae_diffusers")}
    assert theirs == diffusers_names()["vae"]


def test_the_text_tower_of_stable_diffusion_has_the_names_of_transformers():
    from diffusion_jax.models.conditioning.clip import ClipTextTower

    tower, tokens = ClipTextTower(projection_dim=768), jnp.ones((1, 77), jnp.int32)
    tree = jax.eval_shape(lambda key: tower.init(key, tokens)["params"], jax.random.key(0))
    ours = {t.name: t.shape for t in file_tensors(tree, "clip_text_hf")}
    assert ours == diffusers_names()["text"]


def test_clip_names(text, vision):
    hf, opened = named(text, "clip_text_hf"), named(text, "clip_text_open")
    layer = "text_model.encoder.layers.1"
    assert hf[f"{layer}.self_attn.q_proj.weight"].shape == (16, 16)
    assert hf[f"{layer}.mlp.fc1.weight"].shape == (32, 16)
    assert hf["text_projection.weight"].shape == (8, 16)
    assert hf["text_model.embeddings.token_embedding.weight"].aliases == (
        "embeddings.token_embedding.weight",
    )
    layer = "transformer.resblocks.1"
    shapes = {name: tensor.shape for name, tensor in opened.items() if ".0." not in name}
    assert shapes == {
        "token_embedding.weight": (11, 16),
        "positional_embedding": (5, 16),
        "ln_final.weight": (16,),
        "ln_final.bias": (16,),
        "text_projection": (16, 8),
        f"{layer}.ln_1.weight": (16,),
        f"{layer}.ln_1.bias": (16,),
        f"{layer}.ln_2.weight": (16,),
        f"{layer}.ln_2.bias": (16,),
        f"{layer}.attn.in_proj_weight": (48, 16),
        f"{layer}.attn.in_proj_bias": (48,),
        f"{layer}.attn.out_proj.weight": (16, 16),
        f"{layer}.attn.out_proj.bias": (16,),
        f"{layer}.mlp.c_fc.weight": (32, 16),
        f"{layer}.mlp.c_fc.bias": (32,),
        f"{layer}.mlp.c_proj.weight": (16, 32),
        f"{layer}.mlp.c_proj.bias": (16,),
    }
    assert [part.path.split("/")[-2] for part in opened[f"{layer}.attn.in_proj_bias"].parts] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    hf = {name: t.shape for name, t in named(vision, "clip_vision_hf").items()}
    assert hf["vision_model.embeddings.class_embedding"] == (16,)
    assert hf["vision_model.embeddings.patch_embedding.weight"] == (16, 3, 4, 4)
    assert hf["visual_projection.weight"] == (8, 16)
    opened = {name: t.shape for name, t in named(vision, "clip_vision_open").items()}
    assert opened["class_embedding"] == (16,) and opened["positional_embedding"] == (5, 16)
    assert opened["conv1.weight"] == (16, 3, 4, 4) and opened["proj"] == (16, 8)
    assert opened["ln_pre.weight"] == opened["ln_post.bias"] == (16,)


def test_scanned_blocks_have_a_tensor_each(unet):
    scanned = named(unet(scan=True), "unet_ldm")
    name = "middle_block.1.transformer_blocks.1.attn1.to_q.weight"
    assert scanned[name].parts == (Part("middle_block_1/transformer_blocks/attn1/to_q/kernel", 1),)
    plain = named(unet(), "unet_ldm")
    assert {n: t.shape for n, t in scanned.items()} == {n: t.shape for n, t in plain.items()}


def test_video_networks_need_no_table_of_their_own():
    """3-D kernels, blenders and frame embeddings of SVD's UNet and decoder."""

    def tree(paths):
        nested = {}
        for path, shape in paths.items():
            *modules, leaf = path.split("/")
            level = nested
            for module in modules:
                level = level.setdefault(module, {})
            level[leaf] = np.empty(shape)
        return nested

    unet = {
        "input_blocks_1_0/time_stack/in_layers_2/kernel": (3, 1, 1, 5, 7),
        "input_blocks_1_0/time_mixer/mix_factor": (1,),
        "input_blocks_1_1/time_pos_embed_2/kernel": (5, 7),
        "input_blocks_1_1/time_stack_0/ff_in/net_0/proj/bias": (7,),
    }
    assert {t.name: t.shape for t in file_tensors(tree(unet), "unet_ldm")} == {
        "input_blocks.1.0.time_stack.in_layers.2.weight": (7, 5, 3, 1, 1),
        "input_blocks.1.0.time_mixer.mix_factor": (1,),
        "input_blocks.1.1.time_pos_embed.2.weight": (7, 5),
        "input_blocks.1.1.time_stack.0.ff_in.net.0.proj.bias": (7,),
    }
    decoder = {
        "decoder/mid_block_1/time_stack/in_layers_2/kernel": (3, 1, 1, 5, 7),
        "decoder/up_3_block_0/mix_factor": (1,),
        "decoder/time_mix_conv/kernel": (3, 1, 1, 3, 3),
        "quantize/embedding": (9, 4),
    }
    assert {t.name: t.shape for t in file_tensors(tree(decoder), "vae_ldm")} == {
        "decoder.mid.block_1.time_stack.in_layers.2.weight": (7, 5, 3, 1, 1),
        "decoder.up.3.block.0.mix_factor": (1,),
        "decoder.conv_out.time_mix_conv.weight": (3, 3, 3, 1, 1),
        "quantize.embedding.weight": (9, 4),
    }


def test_networks_without_diffusers_names_are_told(unet):
    with pytest.raises(ValueError, match="qkv.*use the names of latent-diffusion"):
        file_tensors({"input_blocks_1_1": {"qkv": {"bias": np.ones(3)}}}, "unet_diffusers")
    with pytest.raises(ValueError, match="this is no UNet: its parameters are encoder.x"):
        file_tensors({"encoder": {"x": np.ones(3)}}, "unet_diffusers")
    with pytest.raises(ValueError, match="halves its sides without convolutions"):
        file_tensors(unet(conv_resample=False), "unet_diffusers")
    with pytest.raises(ValueError, match="name_map = 'sdxl' is unknown; choose from unet_ldm"):
        file_tensors(unet(), "sdxl")


def test_two_parameters_of_one_name_are_told():
    tree = {"out_0": {"scale": np.ones(2)}, "out": {"0": {"scale": np.ones(2)}}}
    with pytest.raises(ValueError, match="would all be called out.0.weight"):
        file_tensors(tree, "dotted")


@pytest.mark.parametrize(
    ("axes", "shape", "there", "entry"),
    [
        ("kernel", (3, 5, 2, 7), (7, 2, 3, 5), lambda a: (a[1, 4, 0, 6], (6, 0, 1, 4))),
        ("kernel", (3, 5, 2, 2, 7), (7, 2, 3, 5, 2), lambda a: (a[1, 4, 0, 1, 6], (6, 1, 1, 4, 0))),
        ("kernel", (2, 7), (7, 2), lambda a: (a[1, 6], (6, 1))),
        ("pointwise", (1, 1, 2, 7), (7, 2), lambda a: (a[0, 0, 1, 6], (6, 1))),
        ("same", (3, 2), (3, 2), lambda a: (a[2, 1], (2, 1))),
    ],
)
def test_axes_are_moved(axes, shape, there, entry):
    array = np.arange(np.prod(shape)).reshape(shape)
    moved = to_file(array, axes)
    number, index = entry(array)
    assert moved.shape == there and moved[index] == number
    np.testing.assert_array_equal(to_ours(moved, axes), array)


def test_every_map_says_what_it_is_for():
    kinds = {"unet", "controlnet", "dit", "vae", "clip text", "clip vision"}
    kinds |= {"module", "first stage", "LPIPS"}
    assert {name_map.kind for name_map in NAME_MAPS.values()} == kinds
