"""What benchmarks/autoencoder.py times in PyTorch is our first stage: parameters and numbers agree.

The weights go through the files that launch.py convert writes, read by PyTorch's strict loader.
"""

import sys
from pathlib import Path
from unittest import mock

import pytest

pytestmark = pytest.mark.parity

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("paired", "autoencoder", "side_autoencoder_jax", "side_autoencoder_torch")


def test_the_peer_sees_the_same_and_takes_a_step(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import autoencoder
    import side_autoencoder_jax
    import side_autoencoder_torch

    specification = {
        **autoencoder.NETS["tiny"]._asdict(), "folder": str(tmp_path), "adaptive": True,
        "dtype": "float32", "device": "cpu", "layout": "channels_first", "compile": False,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    with mock.patch.object(side_autoencoder_jax, "train", lambda *_, **__: (0.0, lambda _: None)):
        ours, _ = side_autoencoder_jax.build(specification)
    theirs, run = side_autoencoder_torch.build(specification | {"network": ours["network"]})
    assert theirs["parameters"] == ours["parameters"]
    autoencoder.same_values(ours["values"], theirs["values"])
    assert all(value != 0.0 for value in ours["values"].values())
    run(2)
    for name in MODULES:
        sys.modules.pop(name, None)
