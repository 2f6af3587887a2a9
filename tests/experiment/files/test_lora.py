"""LoRAs out of trained adapters, and added to the weights of a model wherever they are kept."""

import re

import jax
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.convert.weights.lora import write_lora
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.lora import lora_trees, with_loras
from diffusion_jax.train.adapters import merge

SDXL = "configs/sdxl.py:tiny"
ADAPTED = (
    "--config.adapters.rank=2",
    "--config.adapters.alpha=1",
    r"--config.adapters.layers.some.pattern=^network/middle_block_[01].*(attn1/to_q|in_layers_2)$",
    "--config.adapters.layers.some.rank=3",
    "--config.adapters.layers.texts.pattern=/layers_0/self_attn/out_proj$",
)


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda ours, own: np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize(("layout", "dora"), [("peft", True), ("kohya", False)])
def test_a_file_of_a_run_changes_a_model_as_its_adapters_do(tmp_path, layout, dora):
    """Scanned transformers, convolutions and both text encoders, with a scale of alpha / rank."""
    path = (SDXL, *ADAPTED, f"--config.adapters.dora={dora}")
    experiment, weights = built(*path), trained(*path)
    if dora:  # norms are near 1
        params = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim == 1 else leaf, weights.params)
        weights = weights._replace(params=params)
    network = experiment.network
    base = {name: weights.frozen[name] for name in ("network", "conditioner")}
    lora = experiment.task.adapters.lora(weights)
    assert experiment.task.adapters.ranks(base) == {s: f.down.shape[-1] for s, f in lora.items()}
    trees = lora_trees(network, weights.params, weights.frozen)
    write_lora(lora, tmp_path / "x.safetensors", trees, layout)
    _, found = with_loras(network, {}, base, {tmp_path / "x.safetensors": 1.0})
    whole, _ = experiment.drawing.whole(weights.params, weights.frozen)
    close(found, merge(whole))
    plain = built(SDXL)
    params, frozen = {"network": base["network"]}, {"conditioner": base["conditioner"]}
    again = with_loras(plain.network, params, frozen, {tmp_path / "x.safetensors": 1.0})
    close({**again[0], **again[1]}, merge(whole))


def test_a_file_for_another_model_changes_nothing(tmp_path):
    weights = trained(SDXL, *ADAPTED)
    experiment = built(SDXL, *ADAPTED)
    trees = lora_trees(experiment.network, weights.params, weights.frozen)
    path = tmp_path / "x.safetensors"
    write_lora(experiment.task.adapters.lora(weights), path, trees, "kohya")
    other, own = built("configs/sd15.py:tiny"), trained("configs/sd15.py:tiny")
    message = r"does not fit the networks here: \d+ are of no layer here: lora_\w+"
    with pytest.raises(ValueError, match=message):
        with_loras(other.network, own.params, own.frozen, {path: 1.0})


def test_an_encoder_without_a_name_in_files_is_told():
    path = "configs/emoji_ldm.py:tiny"
    pattern = "--config.adapters.layers.text.pattern=^conditioner/.*to_q"
    experiment = built(path, "--config.adapters.rank=2", pattern)
    with pytest.raises(ConfigError, match=re.escape("conditioner/text") + r".*have no name for"):
        experiment.task.adapters.lora(trained(path, "--config.adapters.rank=2", pattern))


@pytest.mark.slow
def test_loras_of_different_ranks_on_one_layer_add_up(tmp_path):
    """Each times its weight and its alpha / rank, by NumPy from the numbers in the two files."""
    config, own = "configs/sd15.py:tiny", trained("configs/sd15.py:tiny")
    files = {}
    for rank, layout in ((3, "peft"), (2, "kohya")):
        path = (config, f"--config.adapters.rank={rank}", "--config.adapters.alpha=1")
        trees = lora_trees(built(*path).network, trained(*path).params, trained(*path).frozen)
        files[rank] = tmp_path / f"{rank}.safetensors"
        write_lora(built(*path).task.adapters.lora(trained(*path)), files[rank], trees, layout)
    given = {files[3]: 0.8, files[2]: -0.5}
    params, _ = with_loras(built(config).network, own.params, own.frozen, given)
    one, other = (open_weights(files[rank]).tensors for rank in (3, 2))
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = (one[f"unet.{attention}.lora_{name}.weight"].load() for name in "AB")
    renamed = "lora_unet_" + attention.replace(".", "_")
    down, up = (other[f"{renamed}.lora_{name}.weight"].load() for name in ("down", "up"))
    assert (a.shape[0], down.shape[0], float(other[f"{renamed}.alpha"].load())) == (3, 2, 1.0)
    change = 0.8 * b @ a - 0.5 * (1.0 / 2) * up @ down
    block = lambda tree: tree["network"]["middle_block_1"]["transformer_blocks_0"]
    new, old = (block(tree)["attn1"]["to_q"]["kernel"] for tree in (params, own.params))
    np.testing.assert_allclose(new - old, change.T, rtol=1e-4, atol=1e-6)
    assert np.abs(change).max() > 0.01
