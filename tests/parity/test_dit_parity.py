"""DiT against diffusers' DiTTransformer2DModel, and its files in the names of the released ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import export_network
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.safetensors import read_safetensors
from diffusion_jax.models.dit import DiT

pytestmark = pytest.mark.parity
HEADS, HEAD_DIM, DEPTH, CLASSES, SIZE = 2, 8, 2, 5, 8


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=SIZE,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm1.emb" in name and not name.startswith("transformer_blocks.0."):
                continue
            parameter.copy_(0.3 * torch.randn_like(parameter))
        first = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first.state_dict())
            # The paper's frequencies, 10000^(-i / 128); diffusers divides by 127.
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def released(model):
    """The state of diffusers' model in the names of the original files."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    first = "transformer_blocks.0.norm1.emb"
    found = {
        "pos_embed": model.pos_embed.pos_embed.numpy(),
        "y_embedder.embedding_table.weight": state[
            f"{first}.class_embedder.embedding_table.weight"
        ],
    }
    for leaf in ("weight", "bias"):
        found[f"x_embedder.proj.{leaf}"] = state[f"pos_embed.proj.{leaf}"]
        for ours, name in ((0, "linear_1"), (2, "linear_2")):
            found[f"t_embedder.mlp.{ours}.{leaf}"] = state[
                f"{first}.timestep_embedder.{name}.{leaf}"
            ]
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = state[f"proj_out_1.{leaf}"]
        found[f"final_layer.linear.{leaf}"] = state[f"proj_out_2.{leaf}"]
        for index in range(DEPTH):
            block, name = f"transformer_blocks.{index}", f"blocks.{index}"
            parts = [state[f"{block}.attn1.to_{part}.{leaf}"] for part in "qkv"]
            found[f"{name}.attn.qkv.{leaf}"] = np.concatenate(parts)
            found[f"{name}.attn.proj.{leaf}"] = state[f"{block}.attn1.to_out.0.{leaf}"]
            found[f"{name}.mlp.fc1.{leaf}"] = state[f"{block}.ff.net.0.proj.{leaf}"]
            found[f"{name}.mlp.fc2.{leaf}"] = state[f"{block}.ff.net.2.{leaf}"]
            found[f"{name}.adaLN_modulation.1.{leaf}"] = state[f"{block}.norm1.linear.{leaf}"]
    return found


def save(tensors, path):
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


@pytest.mark.parametrize("scan", [False, True])
def test_agrees_with_diffusers(theirs, tmp_path, scan):
    import torch

    tensors = released(theirs)
    save(tensors, tmp_path / "dit.safetensors")
    module = DiT(
        4,
        HEADS * HEAD_DIM,
        DEPTH,
        HEADS,
        num_classes=CLASSES + 1,
        learn_sigma=True,
        scan=scan,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, SIZE, SIZE, 4)).astype(np.float32)
    t, y = np.array([3, 710]), np.array([1, 4])
    arguments = (jnp.asarray(x), jnp.asarray(t))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments, y=jnp.asarray(y))["params"]
    params = import_network(shapes, tmp_path / "dit.safetensors", "dit")

    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(y)
        ).sample
    wanted = wanted.permute(0, 2, 3, 1).numpy()[..., :4]
    found = module.apply({"params": params}, *arguments, y=jnp.asarray(y))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())

    export_network(params, tmp_path / "again.safetensors", "dit")
    again = {k: v.load() for k, v in read_safetensors(tmp_path / "again.safetensors").items()}
    assert set(again) == set(tensors) - {"pos_embed"}
    assert all(np.array_equal(again[name], tensors[name]) for name in again)
