"""The UNet of videos against diffusers: output and gradients, and folders both ways."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import video_fixtures as fixtures

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers
from diffusion_jax.convert.weights.diffusers_video import video_unet_config
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.models.unet.video_unet import VideoUNet

pytestmark = pytest.mark.parity


def test_output_and_every_gradient_agree():
    pytest.importorskip("diffusers")
    module = VideoUNet(**fixtures.FIELDS)
    params = fixtures.drawn_params(module)
    ours, theirs = fixtures.run_ours(module, params), fixtures.run_diffusers(params)
    assert set(ours) == set(theirs)
    floor = 0.01 * max(np.abs(array).max() for name, array in theirs.items() if name != "output")
    errors = {
        name: np.abs(ours[name].reshape(array.shape) - array).max()
        / max(np.abs(array).max(), floor)
        for name, array in theirs.items()
    }
    worst = max(errors, key=errors.get)
    print(f"output {errors['output']:.1e}, x {errors['x']:.1e}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, (worst, errors[worst])


def test_folders_of_diffusers_both_ways(tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    module = VideoUNet(**fixtures.FIELDS, scan=True)
    plain = VideoUNet(**fixtures.FIELDS)
    params = fixtures.drawn_params(plain)
    config = video_unet_config(
        plain, 8, sample_size=8, num_frames=fixtures.FRAMES, time_dim=fixtures.TIME_DIM
    )
    theirs = fixtures.peer({k: v for k, v in config.items() if k[0] != "_"}, params)
    theirs.save_pretrained(tmp_path / "theirs/unet")
    drawn = {name: jnp.asarray(array) for name, array in fixtures.inputs().items()}
    arguments = [drawn[name] for name in ("x", "t", "context", "y")]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    read = import_network(shapes, tmp_path / "theirs", "unet")

    save_diffusers(tmp_path / "ours", {"network": read}, {"network": config})
    back = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "ours/unet")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    again = import_network(shapes, tmp_path / "ours", "unet")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, read))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(read))
