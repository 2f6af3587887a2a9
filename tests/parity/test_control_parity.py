"""ControlNets against diffusers' ControlNetModel: one network, and a whole pipeline."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax import load_config, train_run
from diffusion_jax.convert.weights.diffusers_folder import (
    control_config,
    save_control,
    unet_config,
)
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.files.export import convert_weights

pytestmark = pytest.mark.parity
SHARED = dict(
    out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    use_spatial_transformer=True, attention_resolutions=(2,), context_dim=24, num_head_channels=16,
)  # fmt: skip
UNETS = {
    "sd15": UNet(**SHARED),
    "sd21": UNet(**SHARED, use_linear_in_transformer=True),
    "sdxl": UNet(
        **SHARED, use_linear_in_transformer=True, transformer_depth=(1, 2), scan=True,
        num_classes="sequential", adm_in_channels=8 + 6 * 4,
    ),
}  # fmt: skip


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", UNETS)
def test_a_random_pair_of_networks_computes_the_same(name, tmp_path):
    torch, diffusers = (pytest.importorskip(package) for package in ("torch", "diffusers"))
    unet = UNETS[name]
    net = ControlNet(unet)
    x, context, hint = normal(1, 2, 8, 8, 4), normal(2, 2, 5, 24), np.abs(normal(3, 2, 64, 64, 3))
    t, ids, pooled = np.array([3.0, 700.0], np.float32), np.arange(12.0).reshape(2, 6), None
    numbers = {"time_dim": 4} if name == "sdxl" else {}
    config = unet_config(unet, 4, sample_size=8, **numbers)
    own = control_config(unet, 4, net.hint_channels, **numbers)
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "unet")
    control = diffusers.ControlNetModel.from_config(own).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    control.save_pretrained(tmp_path / "control")

    nchw = lambda array: torch.from_numpy(np.moveaxis(array, -1, 1).copy())
    told, y = {}, None
    if name == "sdxl":
        pooled = normal(4, 2, 8)
        told = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(ids)}
        embedding = theirs.add_time_proj(torch.from_numpy(ids).flatten()).reshape(2, -1).float()
        y = jnp.concatenate([jnp.asarray(pooled), jnp.asarray(embedding.numpy())], -1)
    call = dict(encoder_hidden_states=torch.from_numpy(context), added_cond_kwargs=told)
    with torch.no_grad():
        down, middle = control(
            nchw(x), torch.from_numpy(t), controlnet_cond=nchw(hint), conditioning_scale=0.7,
            return_dict=False, **call,
        )  # fmt: skip
        expected = theirs(
            nchw(x), torch.from_numpy(t), down_block_additional_residuals=down,
            mid_block_additional_residual=middle, **call,
        ).sample  # fmt: skip
        plain = theirs(nchw(x), torch.from_numpy(t), **call).sample

    arguments = (jnp.asarray(x), jnp.asarray(t))
    context, hint = jnp.asarray(context), jnp.asarray(hint)
    init = lambda module, *args: jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    base = import_network(init(unet, *arguments, context, y), tmp_path / "unet", "unet")
    shapes = init(net, *arguments, hint, context, y)
    params = import_network(shapes, tmp_path / "control", "controlnet")

    @jax.jit
    def both(params, base):
        found = net.apply({"params": params}, *arguments, hint, context, y)
        return unet.apply(
            {"params": base}, *arguments, context, y, control=[0.7 * h for h in found]
        )

    found = np.moveaxis(np.asarray(both(params, base)), -1, 1)
    scale = np.abs(expected.numpy()).max()
    assert np.abs(expected.numpy() - plain.numpy()).max() > 0.05 * scale
    assert np.abs(found - expected.numpy()).max() < 1e-4 * scale
    # What diffusers reads of ours is what it wrote itself.
    save_control(tmp_path / "again", params, own)
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == control.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in control.state_dict().items())


def base_model():
    """A tiny Stable Diffusion 1.5 with random numbers, as an experiment and its weights."""
    base, weights = built("configs/sd15.py:tiny"), trained("configs/sd15.py:control_tiny")
    params = {"network": drawn(weights.frozen["network"], 5), "conditioner": {}}
    frozen = {**weights.frozen, "network": params["network"]}
    return base, weights._replace(params=params, frozen=frozen, ema=None)


def test_what_was_trained_from_a_released_file_draws_what_diffusers_draws(tmp_path):
    """A copy of the file's UNet is trained for a few steps, and the run is converted."""
    torch, diffusers = (pytest.importorskip(package) for package in ("torch", "diffusers"))
    base, whole = base_model()
    base.task.export_folder(whole, tmp_path / "sd")
    base.task.export_file(whole, tmp_path / "sd.safetensors")
    given = [
        f"--config.train.ckpt_path={tmp_path / 'sd.safetensors'}", "--config.train.num_steps=3",
        "--config.optimizer.learning_rate=0.02", "--config.hooks.images=delete",
        "--config.lr_schedule.warmup_steps=0",
    ]  # fmt: skip
    config = load_config("configs/sd15.py:control_tiny", given)
    train_run(config, tmp_path / "run", test=False)
    convert_weights(tmp_path / "run", tmp_path / "control", "diffusers")
    ours = Pipeline.from_workdir(tmp_path / "run")
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path / "sd",
        controlnet=diffusers.ControlNetModel.from_pretrained(tmp_path / "control"),
        safety_checker=None,
    )
    theirs.set_progress_bar_config(disable=True)
    noise = normal(0, 2, *ours.experiment.network.image_shape)
    hint = np.random.RandomState(1).randint(0, 256, (32, 32, 3), np.uint8)
    found = theirs(
        ["a red fox"] * 2, image=torch.from_numpy(hint.transpose(2, 0, 1)[None] / 255.0).float(),
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()), num_inference_steps=4,
        guidance_scale=5.0, controlnet_conditioning_scale=0.6, output_type="np",
    ).images  # fmt: skip
    draw = lambda scale: ours(
        "a red fox", n=2, noise=noise, num_steps=4, guidance_scale=5.0, control_image=hint,
        conditioning_scale=scale,
    )  # fmt: skip
    assert np.abs(draw(0.6) / 255.0 - found).max() < 2.5 / 255.0
    assert np.abs(draw(0.0) / 255.0 - found).max() > 5.0 / 255.0
