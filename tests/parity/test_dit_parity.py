"""DiT against diffusers' DiTTransformer2DModel, and its files in the names of the released ones."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import export_network
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.lora import Factors, merge_lora, read_lora, write_lora
from diffusion_jax.convert.weights.lora_names import Spot
from diffusion_jax.convert.weights.names import Part
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


def inputs():
    x = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 4)).astype(np.float32)
    return x, np.array([3, 710]), np.array([1, 4])


def ours(theirs, folder, *, scan):
    """Our network with their weights: (module, parameters)."""
    save(released(theirs), folder / "dit.safetensors")
    module = DiT(
        4, HEADS * HEAD_DIM, DEPTH, HEADS, num_classes=CLASSES + 1, learn_sigma=True, scan=scan
    )
    x, t, y = map(jnp.asarray, inputs())
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y=y)["params"]
    return module, import_network(shapes, folder / "dit.safetensors", "dit")


def agree(module, params, theirs, tolerance=2e-5):
    import torch

    x, t, y = inputs()
    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(y)
        ).sample
    wanted = wanted.permute(0, 2, 3, 1).numpy()[..., :4]
    found = module.apply({"params": params}, jnp.asarray(x), jnp.asarray(t), y=jnp.asarray(y))
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("scan", [False, True])
def test_agrees_with_diffusers(theirs, tmp_path, scan):
    module, params = ours(theirs, tmp_path, scan=scan)
    agree(module, params, theirs)
    tensors = released(theirs)

    export_network(params, tmp_path / "again.safetensors", "dit")
    again = {k: v.load() for k, v in read_safetensors(tmp_path / "again.safetensors").items()}
    assert set(again) == set(tensors) - {"pos_embed"}
    assert all(np.array_equal(again[name], tensors[name]) for name in again)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("scan", "dora", "targets"),
    [(False, True, TARGETS), (True, False, ["to_q", "to_v", "proj_out_2"])],
)  # fmt: skip
def test_a_lora_of_peft_is_loaded_here(theirs, peft, tmp_path, scan, dora, targets):
    """Also where only two of the three layers that are one here were trained, at other ranks."""
    import torch

    module, params = ours(theirs, tmp_path, scan=scan)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets, use_dora=dora,
                             rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})  # fmt: skip
    model = peft.inject_adapter_in_model(config, copy.deepcopy(theirs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {f"transformer.{name}": value.numpy()
             for name, value in peft.get_peft_model_state_dict(model).items()}  # fmt: skip
    save(state, tmp_path / "lora.safetensors")
    trees = {"network": params}
    lora = read_lora(tmp_path / "lora.safetensors", trees)
    agree(module, merge_lora(trees, lora)["network"], model, 1e-4)
    with pytest.raises(AssertionError):
        agree(module, params, model, 1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_of_ours_is_loaded_by_peft(theirs, peft, tmp_path, dora):
    from safetensors.torch import load_file

    module, params = ours(theirs, tmp_path, scan=True)
    blocks, stream, lora = params["blocks"], np.random.default_rng(1), {}
    for layer in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2"):
        for index in range(DEPTH):
            kernel = np.asarray(blocks[layer]["kernel"][index])
            down, up = (
                0.3 * stream.normal(size=shape).astype(np.float32)
                for shape in ((kernel.shape[0], 2), (2, kernel.shape[1]))
            )
            norms = 1.3 * np.sqrt((kernel**2).sum(0)) if dora else None
            spot = Spot("network", Part(f"blocks/{layer}/kernel", index))
            lora[spot] = Factors(down, up, 1.0, norms)
    write_lora(lora, tmp_path / "x.safetensors", {"network": params}, "peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS[:-1], use_dora=dora)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(theirs)).eval()
    state = {name.removeprefix("transformer."): value
             for name, value in load_file(tmp_path / "x.safetensors").items()}  # fmt: skip
    told = peft.set_peft_model_state_dict(model, state)
    assert not told.unexpected_keys
    assert not [name for name in told.missing_keys if "lora_" in name]
    agree(module, merge_lora({"network": params}, lora)["network"], model, 1e-4)
