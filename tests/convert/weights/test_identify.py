"""What files are, by their names and shapes alone."""

import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.identify import (
    describe_weights,
    find_network,
    find_networks,
    unet_family,
)
from diffusion_jax.convert.weights.names import file_tensors

UNET = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.mid.block_1.norm1.weight"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sd1_v1-inference", "v1"),
        ("sd21", "v2"),
        ("sd2_v2-inpainting-inference", "v2_inpainting"),
        ("sd2_x4-upscaling", "upscale"),
        ("sdxl_base", "xl_base"),
        ("sdxl_refiner", "xl_refiner"),
        ("ldm_txt2img-1p4B-eval", "text2img_1p4b"),
        ("toy_mnist_cond", "other"),
        ("svd", "svd"),
        ("sv3d_u", "sv3d_u"),
        ("sv3d_p", "sv3d_p"),
        ("sv4d", "sv4d"),
        ("sv4d2", "sv4d2"),
    ],
)
def test_families_of_released_unets(name, family, released):
    """In the layout of latent-diffusion and in that of diffusers."""
    tree, names = released
    assert unet_family(names[name]).name == family
    if name not in ("sd1_v1-inference", "sdxl_base", "sdxl_refiner"):
        return
    diffusers = {t.name: t.shape for t in file_tensors(tree(name), "unet_diffusers")}
    assert unet_family(diffusers).name == family


def test_other_unets_are_described():
    assert unet_family({"input_blocks.0.0.weight": (8, 3, 3, 3)}).words == (
        "a UNet for 3 channels and no text"
    )
    shapes = {"a.time_stack.x": (1,), "b.attn2.to_k.weight": (8, 1024)}
    assert unet_family(shapes).words == "a video UNet"


@pytest.mark.parametrize(
    ("names", "kind", "name_map", "prefix"),
    [
        ([UNET, VAE], "unet", "unet_ldm", "model.diffusion_model."),
        ([UNET, VAE], "vae", "vae_ldm", "first_stage_model."),
        (["diffusion_model.input_blocks.0.0.weight"], "unet", "unet_ldm", "diffusion_model."),
        (["input_blocks.0.0.weight"], "unet", "unet_ldm", ""),
        (["time_embedding.linear_1.weight"], "unet", "unet_diffusers", ""),
        (["decoder.mid_block.resnets.0.norm1.weight"], "vae", "vae_diffusers", ""),
        # A file of SVD has its first stage, and another one among the conditions.
        (
            [VAE, "conditioner.embedders.3.encoder.decoder.mid.block_1.norm1.weight"],
            "vae",
            "vae_ldm",
            "first_stage_model.",
        ),
        (
            ["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"],
            "clip text",
            "clip_text_hf",
            "cond_stage_model.transformer.",
        ),
        (["embeddings.token_embedding.weight"], "clip text", "clip_text_hf", ""),
        (
            ["a.model.transformer.resblocks.0.ln_1.weight"],
            "clip text",
            "clip_text_open",
            "a.model.",
        ),
        (
            ["a.visual.transformer.resblocks.0.ln_1.weight"],
            "clip vision",
            "clip_vision_open",
            "a.visual.",
        ),
        (["vision_model.embeddings.class_embedding"], "clip vision", "clip_vision_hf", ""),
    ],
)
def test_networks_are_found(names, kind, name_map, prefix):
    assert find_network(names, kind) == (kind, name_map, prefix)


def test_what_is_not_there_is_told():
    with pytest.raises(ValueError, match="x holds no unet, but a vae under 'first_stage_model.'"):
        find_network([VAE], "unet", "x")
    with pytest.raises(ValueError, match="the file holds no vae, but no network that is known"):
        find_network(["linear.weight"], "vae")
    two = [f"conditioner.embedders.{i}.model.transformer.resblocks.0.ln_1.weight" for i in "01"]
    with pytest.raises(ValueError, match="several networks of kind clip text: give prefix, of"):
        find_network(two, "clip text")
    assert len(find_networks(two)) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet of diffusers"),
        ("emb_params", "a textual inversion"),
        ("string_to_param/*", "a textual inversion by torch.save"),
    ],
)
def test_files_beside_a_model_are_called_by_their_names(name, words):
    with pytest.raises(ValueError, match=f"x holds no unet, but {words}$"):
        find_network([name], "unet", "x")


def test_a_file_is_described(tmp_path):
    shapes = {
        UNET: (320, 9, 3, 3),
        "model.diffusion_model.input_blocks.1.1.a.attn2.to_k.weight": (320, 768),
        VAE: (512,),
        "model_ema.decay": (),
    }
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    path = tmp_path / "x.safetensors"
    save_weights(path, [], arrays)
    assert describe_weights(path) == [
        "a Stable Diffusion 1 inpainting UNet under 'model.diffusion_model.', "
        "in the names of unet_ldm",
        "vae under 'first_stage_model.', in the names of vae_ldm",
        "1 averages (EMA)",
    ]


def test_a_folder_is_described(tmp_path):
    text = {"text_model.embeddings.token_embedding.weight": np.zeros((2, 2))}
    save_weights(tmp_path / "text_encoder_2/model.safetensors", [], text)
    unet = {
        "time_embedding.linear_1.weight": np.zeros((4, 4)),
        "conv_in.weight": np.zeros((320, 4, 3, 3)),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": np.zeros((8, 2048)),
    }
    save_weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", [], unet)
    assert describe_weights(str(tmp_path)) == [
        "an SDXL base UNet in unet, in the names of unet_diffusers",
        "clip text in text_encoder_2, in the names of clip_text_hf",
    ]


def test_networks_of_a_kind_are_counted():
    two = [f"conditioner.embedders.{i}.model.transformer.resblocks.0.ln_1.weight" for i in "10"]
    found = [find_network(two, "clip text", number=i).prefix for i in (0, 1)]
    assert found == ["conditioner.embedders.0.model.", "conditioner.embedders.1.model."]
    with pytest.raises(ValueError, match="x holds 2 networks of the kind 'clip text', and numb"):
        find_network(two, "clip text", "x", number=2)
    with pytest.raises(ValueError, match="x holds no vae, but a clip text under"):
        find_network(two, "vae", "x", number=0)
