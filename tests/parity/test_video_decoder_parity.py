"""The first stage of videos and the resizing of conditioning frames against diffusers."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers
from diffusion_jax.convert.weights.diffusers_video import video_vae_config
from diffusion_jax.convert.weights.exporting import export_params
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.models.conditioning.text_embedders import CLIP_MEAN, CLIP_STD, clip_pixels
from diffusion_jax.models.first_stage import VideoAutoencoder

pytestmark = pytest.mark.parity

FIELDS = {
    "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 2, "resolution": 8, "use_quant_conv": True,
    "video_kernel_size": (3, 1, 1),
}  # fmt: skip
MODULE = VideoAutoencoder(**FIELDS)


def random_params():
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.ones((1, 3, 8, 8, 3)))["params"]
    return drawn(shapes)


def peer(params):
    """diffusers' class with these parameters, under the names that are exported."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    config = video_vae_config(MODULE, scale_factor=0.2)
    config = {name: value for name, value in config.items() if name[0] != "_"}
    theirs = diffusers.AutoencoderKLTemporalDecoder(**config)
    exported = dict(export_params(params, "vae_diffusers").tensors)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in exported.items()})
    return theirs


def test_outputs_and_every_gradient_agree():
    """Epsilons differ in neither: 1e-6 within a frame, 1e-5 over time."""
    torch = pytest.importorskip("torch")
    params, stream = random_params(), np.random.default_rng(1)
    video = stream.standard_normal((2, 3, 8, 8, 3)).astype(np.float32)
    cotangents = (
        stream.standard_normal((2, 3, 4, 4, 8)).astype(np.float32),
        stream.standard_normal(video.shape).astype(np.float32),
    )

    def loss(params, video):
        moments = MODULE.apply({"params": params}, video, method="encode")
        decoded = MODULE.apply({"params": params}, moments[..., :4], method="decode")
        total = jnp.sum(moments * cotangents[0]) + jnp.sum(decoded * cotangents[1])
        return total, {"moments": moments, "decoded": decoded}

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, video_grad), ours = gradient(params, jnp.asarray(video))
    ours = {name: np.asarray(array) for name, array in {**ours, "video": video_grad}.items()}

    theirs = peer(params)
    x = torch.tensor(video.reshape(6, 8, 8, 3)).permute(0, 3, 1, 2).requires_grad_()
    moments = theirs.encode(x).latent_dist.parameters
    decoded = theirs.decode(moments[:, :4], num_frames=3).sample
    pairs = zip((moments, decoded), cotangents, strict=True)
    folded = lambda array: torch.tensor(array.reshape(6, *array.shape[2:])).permute(0, 3, 1, 2)
    sum((a * folded(c)).sum() for a, c in pairs).backward()
    results = {"moments": moments, "decoded": decoded, "video": x.grad}
    errors = {}
    for name, result in results.items():
        their = result.detach().permute(0, 2, 3, 1).numpy().reshape(ours[name].shape)
        errors[name] = np.abs(ours[name] - their).max() / np.abs(their).max()
    exported = dict(export_params(grads, "vae_diffusers").tensors)
    own = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert own.keys() == exported.keys()
    # Some gradients are zero but for rounding, that of the keys' bias, say.
    floor = 0.01 * max(np.abs(array).max() for array in own.values())
    for name, their in own.items():
        error = np.abs(exported[name].reshape(their.shape) - their).max()
        errors[name] = error / max(np.abs(their).max(), floor)
    worst = max(errors, key=errors.get)
    shown = ", ".join(f"{name} {errors[name]:.1e}" for name in results)
    print(f"{shown}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, (worst, errors[worst])


def test_folders_of_diffusers_both_ways(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = peer(random_params())
    theirs.save_pretrained(tmp_path / "theirs/vae")
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), random_params()
    )
    read = import_network(shapes, tmp_path / "theirs", "vae")
    config = video_vae_config(MODULE, scale_factor=0.2)
    save_diffusers(tmp_path / "ours", {"first_stage": read}, {"first_stage": config})
    back = type(theirs).from_pretrained(tmp_path / "ours/vae")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.parametrize("size", [(576, 1024), (225, 300), (100, 200), (224, 500)])
def test_frames_are_resized_as_diffusers_does(size):
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip("diffusers.pipelines.stable_video_diffusion")
    resize = pipelines.pipeline_stable_video_diffusion._resize_with_antialiasing
    image = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    theirs = resize(torch.tensor(image).permute(0, 3, 1, 2), (224, 224)).permute(0, 2, 3, 1)
    theirs = ((theirs.numpy() + 1.0) / 2.0 - CLIP_MEAN) / CLIP_STD
    error = np.abs(np.asarray(clip_pixels(jnp.asarray(image))) - theirs).max()
    print(f"{size}: {error:.1e}")
    assert error < 2e-4  # torch computes coordinates in float32
