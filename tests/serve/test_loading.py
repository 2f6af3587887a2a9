"""Weights of a page are loaded once, and another sampler gets an experiment of its own."""

from support.experiments import built

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
