"""LoRAs on the command line of convert and sample: out of runs, of differences, in other names."""

import jax
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.files.export import convert_weights
from diffusion_jax.runs.files.lora import parse_loras
from diffusion_jax.runs.folder import save_config
from diffusion_jax.runs.training import train_run
from diffusion_jax.runs.weights import start_frozen
from diffusion_jax.train.checkpoints.saving import open_checkpoints

SD15, MNIST = "configs/sd15.py:tiny", "configs/mnist.py:tiny"
RANK = "--config.adapters.rank=2"


def test_weights_of_lora_flags():
    found = parse_loras(["a.safetensors:0.8", "/x:y/b.safetensors", "c:-1"])
    assert found == {"a.safetensors": 0.8, "/x:y/b.safetensors": 1.0, "c": -1.0}
    with pytest.raises(ValueError, match=r"--lora=a:much should be FILE:WEIGHT, such as a:0.8"):
        parse_loras(["a:much"])
    with pytest.raises(ValueError, match=r"--lora=a should be given once"):
        parse_loras(["a:1", "a"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A released file of Stable Diffusion."""
    path = tmp_path_factory.mktemp("lora") / "base.safetensors"
    built(SD15).task.export_file(trained(SD15)._replace(ema=None), path)
    return path


@pytest.fixture(scope="module")
def run(base):
    """A run that has trained adapters of it, three steps ago."""
    workdir, options = base.with_name("run"), [RANK, f"--config.train.ckpt_path={base}"]
    experiment, weights = built(SD15, *options), trained(SD15, *options)
    save_config(workdir, load_config(SD15, options))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    checkpoints.save(3, drawn(experiment.abstract_state()), {})
    checkpoints.close()
    start_frozen(experiment, workdir, weights.frozen)
    return workdir


def kernels(path):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    return open_weights(path).tensors[name].load()


@pytest.mark.slow
def test_a_run_of_adapters_is_written_in_every_form(run, tmp_path):
    """Merged, as LoRA files that are read again, and merged from these into the base."""
    config = load_config(SD15, [])
    files = {form: tmp_path / f"{form}.safetensors" for form in ("safetensors", "peft", "kohya")}
    for form, path in files.items():
        assert convert_weights(run, path, form)[-1] == f"wrote {path}"
    again = tmp_path / "again.safetensors"
    said = convert_weights(files["peft"], again, "kohya", config=config)
    assert said[0].endswith("layers of rank 2")
    for name, tensor in open_weights(again).tensors.items():
        np.testing.assert_array_equal(
            tensor.load(), open_weights(files["kohya"]).tensors[name].load()
        )
    plain = tmp_path / "plain.safetensors"
    built(SD15).task.export_file(plain_weights(run), plain)
    merged = tmp_path / "merged.safetensors"
    convert_weights(plain, merged, "safetensors", config=config, loras={files["peft"]: 1.0})
    np.testing.assert_allclose(kernels(merged), kernels(files["safetensors"]), rtol=1e-4, atol=1e-6)
    assert np.abs(kernels(merged) - kernels(plain)).max() > 1e-3
    extracted = tmp_path / "extracted.safetensors"
    options = {"config": load_config(SD15, [RANK]), "base": plain}
    convert_weights(merged, extracted, "peft", **options)
    twice = tmp_path / "twice.safetensors"
    convert_weights(plain, twice, "safetensors", config=config, loras={extracted: 1.0})
    np.testing.assert_allclose(kernels(twice), kernels(merged), rtol=1e-3, atol=1e-5)


def plain_weights(run):
    """What the run adapts, as a model of its own."""
    weights = trained(SD15, RANK, f"--config.train.ckpt_path={run.with_name('base.safetensors')}")
    return trained(SD15)._replace(
        params={"network": weights.frozen["network"], "conditioner": {}}, frozen=weights.frozen
    )


def test_a_run_without_adapters_has_no_lora(tmp_path):
    save_config(tmp_path / "run", load_config(MNIST, []))
    target = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"is a run without config\.adapters"):
        convert_weights(tmp_path / "run", target, "peft")
    with pytest.raises(ValueError, match="--base=x is for --format=peft or kohya"):
        convert_weights(tmp_path / "run", target, "safetensors", base="x")
    assert not target.exists()


def test_a_lora_file_needs_a_config(tmp_path):
    with pytest.raises(ValueError, match="needs --config=, the model that the LoRA is for"):
        convert_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_drawn_with(base, tmp_path):
    """A run of two halves is the run in one piece; what it draws, its file draws on the base."""
    layers = [f"--config.adapters.layers.{name}.rank=2" for name in ("attention", "text")]
    more = ["--config.adapters.dora=True", "--config.optimizer.learning_rate=0.01"]
    options = [RANK, *layers, *more, f"--config.train.ckpt_path={base}"]
    config = load_config(SD15, [*options, "--config.hooks.images=delete"])
    whole = train_run(config, tmp_path / "whole", test=False)
    half = config.copy_and_resolve_references()
    half.train.num_steps = 2
    train_run(half, tmp_path / "run", test=False)
    base.rename(base.with_name("away.safetensors"))  # a run never needs again what it holds
    result = train_run(config, tmp_path / "run", test=False)
    base.with_name("away.safetensors").rename(base)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, whole.state.params)
    pipe = Pipeline.from_workdir(tmp_path / "run", ema=False)
    options = {"n": 2, "num_steps": 4, "seed": 1}
    images = pipe("a fox", **options)
    lora = tmp_path / "lora.safetensors"
    convert_weights(tmp_path / "run", lora, "peft", raw=True)
    plain = Pipeline.from_checkpoint(base, load_config(SD15, []))
    merged = plain.with_lora({lora: 1.0})("a fox", **options)
    difference = np.abs(images.astype(int) - merged.astype(int))
    assert difference.max() <= 2
    assert np.abs(images.astype(int) - plain("a fox", **options).astype(int)).max() > 2
