"""Weights that diffusers, transformers, torch and safetensors wrote, and ours read by them."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.diffusers_folder import (
    penultimate_text,
    save_diffusers,
    text_config,
    unet_config,
    vae_config,
)
from diffusion_jax.convert.weights.diffusers_schedulers import scheduler_config
from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.convert.weights.safetensors import DTYPES
from diffusion_jax.experiment.first_stage.frozen import build_first_stage
from diffusion_jax.models.conditioning.clip import ClipAttention, ClipTextTower, ClipVisionTower
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.unet.unet import UNet

pytestmark = pytest.mark.parity


def package(name):
    """Import a package of the parity environment."""
    return pytest.importorskip(name)


def randomised(module):
    """Give every parameter of a torch module numbers of its own."""
    torch = package("torch")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)
    return module.eval()


def shapes(module, *inputs):
    return jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def close(ours, theirs):
    """Agree within 1e-4 of the largest number, which is not 0."""
    ours, theirs = np.asarray(ours), theirs.detach().float().numpy()
    assert np.abs(theirs).max() > 0.01
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def nchw(array):
    return package("torch").from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


TINY = {
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "use_spatial_transformer": True,
    "attention_resolutions": (2,),
    "context_dim": 24,
}
UNETS = {
    "sd1": TINY | {"num_res_blocks": 2, "num_heads": 4, "attention_resolutions": (1, 2)},
    "sd2_self_attention_off": TINY
    | {
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "disable_self_attentions": (True, False),
    },
    "sdxl": TINY
    | {
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "transformer_depth": (1, 2),
        "num_classes": "sequential",
        "adm_in_channels": 12 + 6 * 4,
        "scan": True,
    },
    "unclip": TINY | {"num_heads": 2, "num_classes": "sequential", "adm_in_channels": 10},
    "labels": TINY | {"num_heads": 2, "num_classes": 7, "num_res_blocks": (1, 2)},
}


def unet_case(name):
    """Our module, its inputs, and diffusers' arguments for the same."""
    torch, module = package("torch"), UNet(**UNETS[name])
    x, t, context = normal(1, 2, 8, 8, 4), np.array([3.0, 700.0], np.float32), normal(2, 2, 5, 24)
    inputs, kwargs = [x, t, context], {}
    if name == "sdxl":
        pooled, ids = normal(3, 2, 12), np.arange(12, dtype=np.float32).reshape(2, 6)
        angles = ids[..., None] * np.exp(-np.log(10000.0) * np.arange(2) / 2)
        waves = np.concatenate([np.cos(angles), np.sin(angles)], -1).reshape(2, 24)
        inputs.append(np.concatenate([pooled, waves], -1).astype(np.float32))
        extra = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(ids)}
        kwargs["added_cond_kwargs"] = extra
    elif module.num_classes is not None:
        inputs.append(np.array([1, 6], np.int32) if name == "labels" else normal(4, 2, 10))
        kwargs["class_labels"] = torch.from_numpy(inputs[-1])
    config = unet_config(module, 4, sample_size=8, text_time=name == "sdxl", time_dim=4)
    call = (nchw(x), torch.from_numpy(t)), {"encoder_hidden_states": torch.from_numpy(context)}
    return module, [jnp.asarray(a) for a in inputs], config, (call[0], call[1] | kwargs)


@pytest.mark.parametrize("name", UNETS)
def test_unets_of_diffusers_both_ways(name, tmp_path):
    diffusers = package("diffusers")
    module, inputs, config, (args, kwargs) = unet_case(name)
    theirs = randomised(diffusers.UNet2DConditionModel.from_config(config))
    expected = theirs(*args, **kwargs).sample.permute(0, 2, 3, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    params = import_network(shapes(module, *inputs), tmp_path / "theirs", "unet")
    close(module.apply({"params": params}, *inputs), expected)

    save_diffusers(tmp_path / "ours", {"network": params}, {"network": config})
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours/unet")
    close(back(*args, **kwargs).sample.permute(0, 2, 3, 1).detach(), expected)
    # The folder of a pipeline, in half precision.
    theirs.half().save_pretrained(tmp_path / "pipeline/unet", variant="fp16")
    half = import_network(shapes(module, *inputs), tmp_path / "pipeline", "unet")
    kernel = params["input_blocks_0_0"]["kernel"].astype(jnp.float16).astype(jnp.float32)
    np.testing.assert_array_equal(half["input_blocks_0_0"]["kernel"], kernel)


def test_a_quantised_first_stage_is_diffusers_vqmodel_both_ways(tmp_path):
    diffusers = package("diffusers")
    section = dict(name="autoencoder_vq", embed_dim=3, z_channels=4, ch=32, ch_mult=(1, 2),
                   num_res_blocks=1, resolution=16, num_codes=32)  # fmt: skip
    stage = build_first_stage(section, (16, 16, 3))
    config = vae_config(stage.module, scale_factor=0.5, num_codes=32)
    theirs = randomised(diffusers.VQModel.from_config(config))
    image, z = jnp.asarray(normal(1, 1, 16, 16, 3)), jnp.asarray(normal(2, 1, 8, 8, 3))
    theirs.save_pretrained(tmp_path / "theirs")
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    params = import_network(abstract, tmp_path / "theirs", "vae")
    close(stage.moments(params, image), theirs.encode(nchw(image)).latents.permute(0, 2, 3, 1))
    quantised, plain = (
        theirs.decode(nchw(z), force_not_quantize=not q).sample.permute(0, 2, 3, 1).detach()
        for q in (True, False)
    )
    close(stage.decode(params, z), quantised)
    as_is = build_first_stage(section | {"quantize": False}, (16, 16, 3))
    close(as_is.decode(params, z), plain)
    assert np.abs(quantised - plain).max() > 0.01

    save_diffusers(tmp_path / "ours", {"first_stage": params}, {"first_stage": config})
    back = diffusers.VQModel.from_pretrained(tmp_path / "ours/vae")
    close(back.decode(nchw(z)).sample.permute(0, 2, 3, 1).detach(), quantised)


@pytest.mark.parametrize("fields", [{}, {"attn_resolutions": (8,)}, {"use_quant_conv": False}])
def test_autoencoders_of_diffusers_both_ways(fields, tmp_path):
    diffusers = package("diffusers")
    module = Autoencoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16, **fields)
    config = vae_config(module, scale_factor=0.5)
    theirs = randomised(diffusers.AutoencoderKL.from_config(config))
    image, z = jnp.asarray(normal(1, 1, 16, 16, 3)), jnp.asarray(normal(2, 1, 8, 8, 4))
    moments = theirs.encode(nchw(image)).latent_dist.parameters.permute(0, 2, 3, 1)
    decoded = theirs.decode(nchw(z)).sample.permute(0, 2, 3, 1)
    # Shards, as large models have them.
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs/diffusion_pytorch_model.safetensors.index.json").is_file()
    params = import_network(shapes(module, image), tmp_path / "theirs", "vae")
    encoded = module.apply({"params": params}, image, method="encode")
    # diffusers clamps the log variance, nothing else.
    close(np.concatenate([encoded[..., :4], np.clip(encoded[..., 4:], -30, 20)], -1), moments)
    close(module.apply({"params": params}, z, method="decode"), decoded)

    save_diffusers(tmp_path / "ours", {"first_stage": params}, {"first_stage": config})
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours/vae")
    assert back.config.scaling_factor == 0.5
    close(back.decode(nchw(z)).sample.permute(0, 2, 3, 1).detach(), decoded)


def text_parts(projection):
    """Our text tower and the class of transformers."""
    transformers = package("transformers")
    tower = ClipTextTower(
        32, 2, 4, 64, projection_dim=12 if projection else None, vocab_size=50, max_length=7
    )
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return tower, getattr(transformers, name), transformers.CLIPTextConfig


@pytest.mark.parametrize("projection", [False, True])
def test_text_encoders_of_transformers_both_ways(projection, tmp_path):
    torch = package("torch")
    tower, kind, config_kind = text_parts(projection)
    tokens = np.array([[1, 5, 9, 49, 0, 0, 0], [1, 2, 3, 4, 5, 6, 49]], np.int32)
    tree = shapes(tower, jnp.asarray(tokens))
    config = text_config(tree, num_heads=4, hidden_act="quick_gelu")
    theirs = randomised(kind(config_kind(**config)))
    theirs.save_pretrained(tmp_path / "theirs")
    params = import_network(tree, tmp_path / "theirs", "clip text")
    states = tower.apply({"params": params}, jnp.asarray(tokens))

    def compare(module):
        output = module(torch.from_numpy(tokens).long(), output_hidden_states=True)
        close(states.normed, output.last_hidden_state)
        close(states.hidden[1], output.hidden_states[1])
        close(
            states.projected if projection else states.pooled,
            output.text_embeds if projection else output.pooler_output,
        )

    compare(theirs)
    trees = {"conditioner": {"text": params}}
    save_diffusers(tmp_path / "ours", trees, {"text": config})
    compare(kind.from_pretrained(tmp_path / "ours/text_encoder").eval())


def test_the_penultimate_layer_is_the_last_of_transformers(tmp_path):
    """What Stable Diffusion 2 reads: the state before the last layer, normed."""
    torch = package("torch")
    tower, _, _ = text_parts(True)
    kind = package("transformers").CLIPTextModel
    tokens = np.array([[1, 5, 9, 49, 0, 0, 0]], np.int32)
    draws = iter(range(1000))
    params = jax.tree.map(
        lambda leaf: normal(next(draws), *leaf.shape) * 0.2, shapes(tower, jnp.asarray(tokens))
    )
    short = penultimate_text(params)
    config = text_config(short, num_heads=4, hidden_act="quick_gelu")
    save_diffusers(tmp_path / "ours", {"conditioner": {"text": short}}, {"text": config})
    theirs = kind.from_pretrained(tmp_path / "ours/text_encoder").eval()
    expected = theirs(torch.from_numpy(tokens).long()).last_hidden_state
    close(tower.apply({"params": params}, jnp.asarray(tokens), 1).normed, expected)


def test_image_encoders_of_transformers(tmp_path):
    transformers = package("transformers")
    tower = ClipVisionTower(32, 2, 4, 64, projection_dim=12, image_size=8, patch_size=4)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=12,
    )
    theirs = randomised(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    image = jnp.asarray(normal(1, 2, 8, 8, 3))
    params = import_network(shapes(tower, image), tmp_path, "clip vision")
    close(tower.apply({"params": params}, image).projected, theirs(nchw(image)).image_embeds)


def test_openclip_joins_as_torch_does():
    """in_proj_weight of torch's MultiheadAttention, which OpenCLIP's layers are made of."""
    torch = package("torch")
    theirs = randomised(torch.nn.MultiheadAttention(32, 4, batch_first=True))
    x = normal(1, 2, 5, 32)
    module = ClipAttention(4)
    tree = shapes(module, jnp.asarray(x))
    draws = iter(range(100))
    params = jax.tree.map(lambda leaf: normal(next(draws), *leaf.shape) * 0.3, tree)
    wrapped = {"encoder": {"layers_0": {"self_attn": params}}}
    state = {
        name.removeprefix("transformer.resblocks.0.attn."): torch.from_numpy(array.copy())
        for name, array in export_params(wrapped, "clip_text_open").tensors
    }
    theirs.load_state_dict(state)
    expected, _ = theirs(*[torch.from_numpy(x)] * 3)
    close(module.apply({"params": params}, jnp.asarray(x)), expected)


def test_files_by_torch_save_are_read_as_torch_reads_them(tmp_path):
    torch = package("torch")
    base = torch.randn(6, 8)
    content = {
        "plain": base,
        "view": base[1::2, 3:],
        "transposed": base.T,
        "expanded": base[:1].expand(5, 8),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{
            str(kind): torch.arange(4).to(kind)
            for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
        },
    }
    path = tmp_path / "x.ckpt"
    # Not as an archive is the format of PyTorch before 1.6.
    for is_archive, wrapped in ((True, content), (True, {"state_dict": content}), (False, content)):
        torch.save(wrapped, path, _use_new_zipfile_serialization=is_archive)
        tensors = open_weights(path).tensors
        assert list(tensors) == list(content)
        for name, tensor in content.items():
            ours = tensors[name].load().astype(np.float64)
            np.testing.assert_array_equal(ours, tensor.detach().double().numpy(), err_msg=name)


def test_the_package_safetensors_reads_ours_and_we_its(tmp_path):
    torch, numpy_side = package("torch"), package("safetensors.torch")
    arrays = {code: np.arange(6).reshape(2, 3).astype(kind) for code, kind in DTYPES.items()}
    ours = tmp_path / "ours.safetensors"
    save_weights(ours, [], arrays)
    loaded = numpy_side.load_file(ours)
    assert set(loaded) == set(arrays)
    for name, tensor in loaded.items():
        expected = arrays[name].astype(np.float64)
        np.testing.assert_array_equal(tensor.to(torch.float64).numpy(), expected, err_msg=name)
    numpy_side.save_file(loaded, tmp_path / "theirs.safetensors")
    for name, tensor in open_weights(tmp_path / "theirs.safetensors").tensors.items():
        np.testing.assert_array_equal(tensor.load(), arrays[name], err_msg=name)


def test_a_whole_folder_becomes_a_pipeline(tmp_path):
    diffusers, torch = package("diffusers"), package("torch")
    module, inputs, config, _ = unet_case("sd1")
    vae = Autoencoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16)
    tower, _, _ = text_parts(False)
    draws = iter(range(10**6))

    def draw(tree):
        return jax.tree.map(lambda leaf: normal(next(draws), *leaf.shape) * 0.1, tree)

    params = {
        "network": draw(shapes(module, *inputs)),
        "first_stage": draw(shapes(vae, jnp.ones((1, 16, 16, 3)))),
        "conditioner": {"text": draw(shapes(tower, jnp.ones((1, 7), jnp.int32)))},
    }
    text = text_config(params["conditioner"]["text"], num_heads=4, hidden_act="quick_gelu")
    schedule = scheduler_config(beta_start=0.00085, beta_end=0.012)
    configs = {
        "network": config,
        "first_stage": vae_config(vae, scale_factor=0.18215),
        "text": text,
        "scheduler": schedule,
    }
    save_diffusers(tmp_path / "sd", params, configs)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", tokenizer=None)
    embeds = torch.from_numpy(normal(5, 1, 5, 24))
    images = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
