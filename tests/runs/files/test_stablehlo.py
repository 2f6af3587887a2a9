"""A program in a file draws what the Pipeline draws, where this package cannot be imported."""

import subprocess
import sys

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.files import stablehlo
from diffusion_jax.runs.files.stablehlo import write_stablehlo

TINY = "configs/mnist.py:tiny"
ALONE = """
import sys
sys.modules["diffusion_jax"] = None  # importing it fails
import jax, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
labels = np.array([7, 3], np.int32)
np.save(sys.argv[2], np.asarray(program.call({"label": labels}, np.uint32(5))))
print(program.platforms, "flax" in sys.modules)
"""


@pytest.mark.slow
def test_a_file_draws_in_a_process_that_cannot_import_this_package(tmp_path):
    weights, path = trained(TINY), tmp_path / "x.stablehlo"
    said = write_stablehlo(built(TINY), weights, path, batch_size=2)
    assert said == (
        'jax.export.deserialize(open("x.stablehlo", "rb").read()).call('
        "{'label': int32 [2]}, uint32 seed) -> uint8 [2, 28, 28, 1]"
    )
    command = [sys.executable, "-c", ALONE, path, tmp_path / "x.npy"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "('cpu', 'cuda', 'tpu') False\n"
    pipe = Pipeline(built(TINY), weights.params, weights.frozen)
    drawn, found = pipe([7, 3], seed=5), np.load(tmp_path / "x.npy")
    assert drawn.std() > 1 and found.shape == drawn.shape
    assert np.abs(drawn.astype(int) - found).max() <= 1
    assert [file.name for file in tmp_path.iterdir() if "tmp" in file.name] == []


def test_what_cannot_be_a_program_is_told_and_nothing_is_written(tmp_path, monkeypatch):
    path = tmp_path / "x.stablehlo"
    monkeypatch.setattr(stablehlo, "_MOST_BYTES", 10**5)
    with pytest.raises(ValueError, match="would hold 0.0 GB of weights and can hold 0.0 GB; --dt"):
        write_stablehlo(built(TINY), trained(TINY), path)
    with pytest.raises(ValueError, match="--batch_size=0 should be at least 1"):
        write_stablehlo(built(TINY), trained(TINY), path, batch_size=0)
    assert not list(tmp_path.iterdir())
