"""Every program of a run can be lowered without its values."""

import jax
import pytest

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.plan.parts import parts_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "names"),
    [("mnist", ["train", "eval", "sample"]), ("emoji_vae", ["train", "eval"])],
)
def test_the_programs_of_a_run_are_lowered(config, names):
    built = make_experiment(load_config(f"configs/{config}.py:tiny", []), devices=jax.devices()[:1])
    lowered = {name: lower(built) for name, lower in parts_of(built).items()}
    assert list(lowered) == names
    for name, program in lowered.items():
        assert "convolution" in program.as_text(), name
    state = jax.tree.leaves(built.abstract_state())
    assert len(jax.tree.leaves(lowered["train"].out_info[0])) == len(state)
    if "sample" in names:
        assert lowered["sample"].out_info.shape == (built.training.batch_size, 28, 28, 1)
