"""What may be converted into what; a run made from weights starts at step 0 with them."""

import jax
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.files.export import convert_weights, convert_yaml, write_run
from diffusion_jax.runs.folder import load_saved_config, save_config
from diffusion_jax.runs.weights import load_trained, start_frozen
from diffusion_jax.train.checkpoints.reading import load_metadata, saved_steps
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import ema_params

TINY = "configs/mnist.py:tiny"


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made from weights, on one device."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    known = {"class_names": ["zero", "one"], "seed": 3}
    write_run(built(TINY), trained(TINY), load_config(TINY, []), workdir, known)
    return workdir


def test_a_run_of_weights_has_them_raw_and_as_averages_at_step_0(run):
    params = trained(TINY).params
    assert saved_steps(run / "checkpoints") == [0]
    for ema in (False, True):
        same(load_trained(built(TINY), run, ema=ema).params, params)
    assert load_saved_config(run) == load_config(TINY, [])
    metadata = load_metadata(run / "checkpoints")
    assert metadata["class_names"] == ["zero", "one"] and "seed" not in metadata


@pytest.mark.parametrize(
    ("form", "target", "options", "message"),
    [
        ("safetensors", "there", {}, "exists; choose another name, nothing is overwritten"),
        ("run", "new", {}, "is a run already; choose another format"),
        ("diffusers", "new", {}, "no counterpart in diffusers.*; export this network as a .safet"),
        ("diffusers", "new", {"step": 5}, "5"),
    ],
)
def test_a_run_that_cannot_be_converted_is_told_and_nothing_is_written(
    tmp_path, run, form, target, options, message
):
    (tmp_path / "there").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_weights(run, tmp_path / target, form, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not any((tmp_path / "there").iterdir())


def test_a_file_needs_the_config_that_describes_it(tmp_path):
    file = tmp_path / "x.safetensors"
    save_weights(
        file, [], {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((8, 3, 3, 3))}
    )
    with pytest.raises(ValueError, match="needs --config=, because no shipped config describes it"):
        convert_weights(file, tmp_path / "run", "run")
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="a/b/run cannot be written: .*a is a file"):
        convert_weights(file, tmp_path / "a/b/run", "run")
    with pytest.raises(ValueError, match="--with_ema is for runs"):
        convert_weights(
            file, tmp_path / "y", "diffusers", config=load_config(TINY, []), with_ema=True
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "raw", "averages"),
    [({}, "ema", None), ({"raw": True}, "params", None), ({"with_ema": True}, "params", "ema")],
)
def test_a_run_is_written_with_the_weights_that_were_asked_for(
    tmp_path, text_run, options, raw, averages
):
    """Its averages are other numbers than its parameters, as they are after training."""
    workdir, state = text_run
    weights = {"params": state.params, "ema": ema_params(state.opt_state)}
    target = tmp_path / "x.safetensors"
    said = convert_weights(workdir, target, "safetensors", **options)
    assert said == ["layout sd1", f"wrote {target}"]
    tensors = open_weights(target).tensors
    names = "model.diffusion_model.out.2.bias", "model_ema.diffusion_modelout2bias"
    for name, wanted in zip(names, (raw, averages), strict=True):
        assert (name in tensors) == (wanted is not None)
        if wanted is not None:
            expected = weights[wanted]["network"]["out_2"]["bias"]
            np.testing.assert_array_equal(tensors[name].load(), expected)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    path = "configs/sd15.py:tiny"
    workdir = tmp_path_factory.mktemp("export") / "text"
    state = drawn(built(path).abstract_state())
    save_config(workdir, load_config(path, []))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    checkpoints.save(3, state, {})
    checkpoints.close()
    start_frozen(built(path), workdir, trained(path).frozen)
    return workdir, state


YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    image_size: 32
    cond_stage_config: __is_unconditional__
    first_stage_config: {target: ldm.models.autoencoder.IdentityFirstStage}
    unet_config:
      target: x.UNetModel
      params: {in_channels: 3, out_channels: 3, model_channels: 32, num_res_blocks: 1,
               attention_resolutions: [2], channel_mult: [1, 2], num_heads: HEADS}
"""


@pytest.mark.parametrize(("heads", "problem"), [(4, None), (7, "num_heads = 7 does not divide")])
def test_a_yaml_is_converted_and_what_keeps_it_from_being_built_is_told(tmp_path, heads, problem):
    (tmp_path / "x.yaml").write_text(YAML.replace("HEADS", str(heads)))
    said, found = convert_yaml(tmp_path / "x.yaml", tmp_path / "new/x.py")
    assert said[-1].startswith(f"wrote {tmp_path}/new/x.py") and (tmp_path / "new/x.py").is_file()
    assert (found is None) if problem is None else problem in str(found)
