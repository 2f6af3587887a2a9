"""What the benchmarks time in PyTorch is our network, and makes our latents."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["demo", "wide28", "cifar10", "tiny"])
def test_the_peer_has_our_parameters_and_output(monkeypatch, name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paired
    import side_torch

    net = paired.NETS[name]
    config = load_config(net.config, [*net.overrides, "--config.train.batch_size=8"])
    built = make_experiment(config, devices=jax.devices()[:1])
    parameters = jax.eval_shape(built.init, jax.random.key(0)).params
    height, width, channels = built.network.image_shape
    patch = built.network.module.patch_size
    with torch.device("meta"):
        model = config.model.to_dict() | {"num_classes": built.network.module.num_classes}
        peer = side_torch.network(model, channels)
        shape = (2, channels * patch**2, height // patch, width // patch)
        labels = torch.zeros(2, dtype=torch.long)
        out = peer(torch.zeros(shape), torch.zeros(2), class_labels=labels).sample
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
    assert sum(p.numel() for p in peer.parameters()) == ours
    assert out.shape == shape
    for name in ("paired", "side_torch"):
        sys.modules.pop(name, None)


@pytest.mark.parity
def test_both_sides_of_latent_sampling_make_the_same_latents(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sampling
    import side_latents_jax
    import side_latents_torch

    specification = {
        **sampling.NETS["tiny"]._asdict(),
        "latents": 16,
        "batch_size": 2,
        "num_steps": 5,
        "guidance_scale": 5.0,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "layout": "channels_first",
        "compile": False,
        "folder": str(tmp_path),
    }
    ours, _ = side_latents_jax.build(specification)
    theirs, _ = side_latents_torch.build(specification)
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["difference"] < 1e-4
    # The latents depend on everything: other noise levels or conditions are noticed.
    latents = np.load(tmp_path / "latents.npy")
    assert np.abs(latents).max() > 0.1 and latents.shape == (2, 16, 16, 4)
    context = np.load(tmp_path / "conditional_context.npy")
    np.save(tmp_path / "conditional_context.npy", context[::-1])
    with pytest.raises(ValueError, match="the latents of both sides differ"):
        side_latents_torch.build(specification)
    names = ("paired", "random_weights", "sampling", "side_latents_jax", "side_latents_torch")
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parity
def test_the_race_runs_to_its_table(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)
    import race

    out = tmp_path / "race"
    options = f"--tiny --minutes=0.05 --out={out} --peer_python={sys.executable}"
    found = race.main(options.split())
    theirs, equal_time, equal_steps = found["rows"]
    assert [row["name"] for row in found["rows"]] == [
        "diffusers", "ours, equal time", "ours, equal steps"
    ]  # fmt: skip
    assert theirs["steps"] == equal_steps["steps"] >= 1 and equal_time["steps"] >= 1
    assert all(row["mind"] > 0 and 0 <= row["copied"] <= 1 for row in found["rows"])
    table = (out / "race.md").read_text()
    assert table.startswith("| training | steps |") and "| ours, equal time |" in table
    assert {path.name for path in out.iterdir()} >= {"race.json", "race.md", "race.png"}
    for name in ("race", "race_data", "paired"):
        sys.modules.pop(name, None)


def test_a_race_whose_judge_is_missing_trains_nothing(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)

    def missing(name):
        raise FileNotFoundError(f"the weights of {name} are not installed")

    monkeypatch.setattr("diffusion_jax.experiment.scoring.make_extractor", missing)
    import race

    with pytest.raises(FileNotFoundError, match="efficientnet_lite0 are not installed"):
        race.main(["--tiny", f"--out={tmp_path / 'race'}"])
    assert not list((tmp_path / "race").iterdir())
    for name in ("race", "race_data", "paired"):
        sys.modules.pop(name, None)
