"""Weights of a page are loaded once, and another sampler gets an experiment of its own."""

import jax
import numpy as np
from support.experiments import built, trained

from diffusion_jax.convert.weights.embeddings import Embedding, write_embedding
from diffusion_jax.convert.weights.lora import write_lora
from diffusion_jax.experiment.files.lora import lora_trees
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.serve import loading
from diffusion_jax.serve.loading import make_load

MNIST = "configs/mnist.py:tiny"


def test_a_run_is_loaded_once_for_all_samplers(monkeypatch):
    asked = []

    def from_workdir(workdir, *, overrides):
        asked.append((workdir, overrides))
        return Pipeline(built(MNIST), {"a": 1}, {})

    monkeypatch.setattr(Pipeline, "from_workdir", from_workdir)
    opened = lambda path, overrides: (asked.append((str(path), overrides)), None)
    monkeypatch.setattr(loading, "open_run", opened)
    load = make_load("runs/x", None, None, ["--config.seed=3"])
    assert load("").experiment is load("").experiment is built(MNIST)
    assert load("heun").params == {"a": 1} and load("heun") is load("heun")
    changed = ["--config.seed=3", "--config.sampler.name=heun"]
    assert asked == [("runs/x", ["--config.seed=3"]), ("runs/x", changed)]


def test_a_file_is_loaded_with_its_config(monkeypatch):
    asked = []

    def from_checkpoint(path, config, *, overrides):
        asked.append((path, config, overrides))
        return Pipeline(built(MNIST), {"a": 1}, {})

    monkeypatch.setattr(Pipeline, "from_checkpoint", from_checkpoint)
    load = make_load(None, "x.ckpt", MNIST)
    assert load("").params == {"a": 1} and asked == [("x.ckpt", MNIST, ())]
    assert load("ddim").experiment.sections["sampler"]["name"] == "ddim"


def test_added_files_are_there_with_every_sampler(monkeypatch, tmp_path):
    """The weights of a LoRA, and the words of an embedding, which a new experiment lacks."""
    config, ranked = "configs/sd15.py:tiny", "--config.adapters.rank=2"
    lora, toy = tmp_path / "style.safetensors", tmp_path / "toy.safetensors"
    adapted, weights = built(config, ranked), trained(config, ranked)
    trees = lora_trees(adapted.network, weights.params, weights.frozen)
    write_lora(adapted.task.adapters.lora(weights), lora, trees, "peft")
    own = trained(config)
    plain = Pipeline(built(config), own.params, own.frozen)
    table = own.frozen["conditioner"]["text"]["embeddings"]["token_embedding"]["embedding"]
    write_embedding(toy, Embedding("<toy>", {None: np.ones((2, table.shape[1]))}))
    monkeypatch.setattr(Pipeline, "from_checkpoint", lambda path, config, *, overrides: plain)
    more = {"loras": {lora: 0.5}, "embeddings": [(str(toy), "<t>")]}
    load = make_load(None, "x.ckpt", config, **more)
    wanted = plain.with_lora({lora: 0.5}).with_embedding(toy, "<t>")
    assert load("euler").experiment.sections["sampler"]["name"] == "euler"
    for pipe in (load(""), load("euler")):
        jax.tree.map(np.testing.assert_array_equal, pipe.params, wanted.params)
        jax.tree.map(np.testing.assert_array_equal, pipe.frozen, wanted.frozen)
        batch = {"caption": ["a <t>"], "image": np.zeros((1, 32, 32, 3), np.float32)}
        tokens = pipe.experiment.network.with_inputs(batch)
        words = wanted.experiment.network.with_inputs(batch)
        (name,) = set(tokens) - {"caption", "image"}
        np.testing.assert_array_equal(tokens[name], words[name])
        assert tokens[name].max() > table.shape[0] - 1  # the new word, not its letters
