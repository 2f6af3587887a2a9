"""The `adapters` section: what is trained, what is frozen, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.convert.weights.lora import write_lora
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.lora import lora_trees
from diffusion_jax.experiment.task import Trained

SD15, MNIST, DIT = (f"configs/{name}.py:tiny" for name in ("sd15", "mnist", "dit_emoji"))
RANK = "--config.adapters.rank=2"
LAYER = "--config.adapters.layers"


def adapted(path=SD15, *more):
    return built(path, RANK, *more)


def layers(experiment):
    """The layers with adapters, without the numbers of blocks."""
    tree = experiment.abstract_state().params["adapters"]
    paths = (jax.tree_util.keystr(p[:-1], simple=True, separator="/") for p, _ in
             jax.tree_util.tree_leaves_with_path(tree))  # fmt: skip
    return {re.sub(r"\d+", "N", path) for path in paths}


def test_only_adapters_are_trained_and_all_else_is_frozen():
    experiment, plain = adapted(), built(SD15)
    state, frozen = experiment.abstract_state(), experiment.abstract_frozen()
    assert state.params.keys() == {"adapters"}
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in state[1:3]]
    assert counts[1] < 4 * counts[0]  # two moments, the average, a few counters
    assert jax.tree.structure(frozen["network"]) == jax.tree.structure(
        plain.abstract_state().params["network"]
    )
    assert frozen["conditioner"].keys() == {"text"}


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        (SD15, "attention", "network/middle_block_N/transformer_blocks_N/attnN/to_out_N"),
        (SD15, "feed_forward", "network/middle_block_N/transformer_blocks_N/ff/net_N/proj"),
        (SD15, "convolution", "network/output_blocks_N_N/skip_connection"),
        (SD15, "text", "conditioner/text/encoder/layers_N/self_attn/out_proj"),
        (MNIST, "attention", "network/middle_block_N/qkv"),
        (DIT, "attention", "network/blocks/attn_qkv"),
        (DIT, "attention", "network/blocks/attn_proj"),
        (DIT, "attention", "network/blocks/cross_attn/to_q"),
        (DIT, "feed_forward", "network/blocks/mlp_fcN"),
    ],
)
def test_names_of_layers_mean_what_they_say(path, name, expected):
    found = layers(built(path, f"{LAYER}.{name}.rank=2"))
    assert expected in found
    others = {
        "attention": r"ff/|mlp",
        "feed_forward": "attn",
        "convolution": "attn",
        "text": "network",
    }
    assert not any(re.search(others[name], layer) for layer in found)


def test_ranks_and_alphas_of_patterns():
    experiment = adapted(
        SD15, f"{LAYER}.text.alpha=1", f"{LAYER}.mine.pattern=op$", f"{LAYER}.mine.rank=3"
    )
    tree = experiment.abstract_state().params["adapters"]
    own = tree["network"]["input_blocks_2_0"]["op"]
    text = tree["conditioner"]["text"]["encoder"]["layers_0"]["self_attn"]["q_proj"]
    assert own["down"].shape[-1] == 3 and text["down"].shape[-1] == 2
    scales = experiment.task.adapters.ranks(experiment.abstract_frozen())
    assert sorted({*scales.values()}) == [2, 3]


def test_a_base_in_bfloat16_takes_half_the_memory():
    frozen = adapted(SD15, "--config.model.dtype=bfloat16").abstract_frozen()
    own = frozen["network"]["middle_block_1"]["proj_in"]
    assert (own["kernel"].dtype, own["bias"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.slow
def test_the_base_is_read_from_a_released_file_and_written_merged(tmp_path):
    """Adapters whose `up` is 0 change nothing: what is written is what was read."""
    weights = trained(SD15)._replace(ema=None)
    built(SD15).task.export_file(weights, tmp_path / "base.safetensors")
    experiment = adapted(SD15, f"--config.train.ckpt_path={tmp_path}/base.safetensors")
    frozen = experiment.task.load_frozen(
        experiment.abstract_frozen(), lambda: weights.frozen, tmp_path / "base.safetensors"
    )
    jax.tree.map(np.testing.assert_array_equal, frozen["network"], weights.params["network"])
    assert frozen["conditioner"].keys() == weights.frozen["conditioner"].keys()
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), experiment.abstract_state().params)
    frozen = {**frozen, "scale_factor": jnp.float32(1)}
    experiment.task.export_file(Trained(params, {}, frozen, params), tmp_path / "out.safetensors")
    ours, theirs = (open_weights(tmp_path / f"{n}.safetensors").tensors for n in ("out", "base"))
    assert any(name.startswith("model_ema.") for name in ours)
    for name in theirs:
        np.testing.assert_allclose(ours[name].load(), theirs[name].load(), 1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (SD15, ["--config.adapters.rank=0"], "config.adapters.rank = 0 should be at least 1"),
        (SD15, ["--config.adapters.alpha=0.0"], "alpha = 0.0 should be above 0"),
        (SD15, [f"{LAYER}.x.pattern=nope"], "'nope' should be found in the path of a layer; there"),
        (SD15, [f"{LAYER}.x.pattern=(x"], "should be a regular expression"),
        (SD15, [f"{LAYER}.atention.rank=3"], "did you mean 'attention'"),
        (SD15, [RANK, "--config.adapters.layers={}"], "layers = {} should name attention"),
        (MNIST, [f"{LAYER}.text.rank=3"], "should be found in the path of a layer; there are net"),
        (
            SD15,
            [
                f"{LAYER}.text.rank=3",
                "--config.latent_cache.folder=x",
                "--config.data.batches.crop=center",
            ],
            "latent_cache.text = True should be False: config.adapters changes conditioner/text/",
        ),
        ("configs/vae_kl_f8.py:tiny", [RANK], "config.adapters is for diffusion models"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(path, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        built(path, *overrides).abstract_state()


def test_adapters_need_weights_to_adapt(tmp_path):
    with pytest.raises(ConfigError, match="ckpt_path is not set: config.adapters needs the wei"):
        adapted().task.check_sources()
    adapted(SD15, f"--config.train.ckpt_path={tmp_path}").task.check_sources()


def test_training_begins_with_a_file_of_the_same_layers(tmp_path):
    """What is read is what was written, whatever alpha it was written with."""
    path, files = tmp_path / "x.safetensors", [f"--config.train.ckpt_path={tmp_path}"]
    experiment, weights = adapted(DIT, *files), trained(DIT, RANK, *files)
    trees = lora_trees(experiment.network, {}, weights.frozen)
    lora = experiment.task.adapters.lora(weights)
    halved = {s: f._replace(alpha=0.5 * f.alpha, up=2 * f.up) for s, f in lora.items()}
    write_lora(halved, path, trees, "peft")
    files.append(f"--config.adapters.from_file={path}")
    task = adapted(DIT, *files, "--config.adapters.alpha=1").task
    task.check_sources()
    begun = task.first_params(weights.params, weights.frozen)["adapters"]
    own = weights.params["adapters"]
    qkv, before = (tree["network"]["blocks"]["attn_qkv"] for tree in (begun, own))
    np.testing.assert_array_equal(qkv["down"], before["down"])
    np.testing.assert_array_equal(qkv["up"], 2 * before["up"])
    for more, message in (
        (
            [RANK.replace("2", "4")],
            r"12 layers have another rank: network/blocks/attn_\w+ .0. has 2 in the file and 4",
        ),
        ([f"{LAYER}.feed_forward.rank=2"], "4 layers here are not in the file: network/blocks/mlp"),
        (["--config.adapters.dora=True"], "have no magnitudes, and config.adapters.dora = True"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted(DIT, *files, *more).task.check_sources()
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        files[-1] = f"--config.adapters.from_file={tmp_path}/none.safetensors"
        adapted(DIT, *files).task.check_sources()


def test_what_is_trained_and_what_it_adapts_are_split_over_a_mesh():
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    wide = [*mesh, "--config.model.model_channels=192"]
    experiment = built(MNIST, RANK, *wide, devices=2)
    own = experiment.abstract_frozen()["network"]["middle_block_1"]["qkv"]["kernel"]
    assert "fsdp" in str(own.sharding.spec)
    assert drawn(experiment.abstract_state().params, 0).keys() == {"adapters"}
