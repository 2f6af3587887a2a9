"""YAML configs -> config files: they build, with the released sizes, and no key is overlooked."""

import math
import subprocess
import sys
from typing import Any

import jax
import pytest

from diffusion_jax.convert.yaml.from_yaml import config_from_yaml
from diffusion_jax.convert.yaml.reading import leaves
from diffusion_jax.experiment.config.files import load_config

# Parameters of the originals' networks, counted on their own classes (upstream.md, section 7.5).
SIZES_OF_RELEASES = {
    "mnist_cond": 2_600_705,
    "mnist": 2_567_681,
    "cin256": 400_920_579,
    "sd_xl_base": 2_567_463_684,
    "sd_xl_refiner": 2_259_526_660,
    "sd_2_1": 865_910_724,
    "v2_inference_v": 865_910_724,
    "v1_inference": 859_520_964,
    "churches": 294_966_916,
    "imagenet_f8": 407_307_012,
}
CHEAP = ("mnist_cond", "mnist")


@pytest.mark.parametrize(
    "name",
    [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in SIZES_OF_RELEASES],
)
def test_the_converted_network_has_the_parameters_of_the_original(name, tmp_path, yamls):
    built = yamls.build(yamls.load(yamls.EXAMPLES[name](), tmp_path))
    shapes = jax.eval_shape(built.network.init, jax.random.key(0))["network"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == SIZES_OF_RELEASES[name]


@pytest.mark.parametrize(
    ("name", "shipped"), [("sd_xl_base", "sdxl"), ("sd_xl_refiner", "sdxl_refiner")]
)
def test_sdxl_converts_to_the_shipped_config(name, shipped, tmp_path, yamls):
    ours = load_config(f"configs/{shipped}.py", [])
    theirs = yamls.load(yamls.EXAMPLES[name](), tmp_path)
    with ours.unlocked(), theirs.unlocked():
        del ours.model["dtype"]  # a YAML leaves it to the precision of the trainer
        for embedder in theirs.conditioning.embedders.values():
            if embedder.name == "numbers":
                assert embedder.outdim == 256  # our default
                del embedder["outdim"]
    assert list(theirs.conditioning.embedders) == list(ours.conditioning.embedders)
    for section in ("conditioning", "model", "schedule"):
        assert theirs[section].to_dict() == ours[section].to_dict()
    ours, theirs = yamls.build(ours), yamls.build(theirs)
    assert theirs.network.module == ours.network.module
    assert theirs.network.first_stage == ours.network.first_stage._replace(
        module=theirs.network.first_stage.module
    )
    for network in (ours.network, theirs.network):
        shapes = jax.eval_shape(network.first_stage.init, jax.random.key(0))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert count == 34_163_592 + 49_490_179 + (8 * 8 + 8) + (4 * 4 + 4)


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value}0,1"


def test_no_value_is_overlooked(any_example, yamls):
    """Change each value in turn: the sections, the list or an error has to show it."""
    before = yamls.parts(any_example)
    for path, value in leaves("", any_example):
        if any(path == known or path.startswith(f"{known}.") for known in before[1]):
            continue
        try:
            after = yamls.parts(yamls.changed(any_example, path, other(value)))
        except ValueError:
            continue
        assert after != before, path


def test_a_key_that_nobody_knows_is_listed_wherever_it_stands(any_example, yamls):
    before = yamls.listed(any_example)
    for parent in {path.rpartition(".")[0] for path, _ in leaves("", any_example)}:
        typo = f"{parent}.typo_of_mine"
        listed = yamls.listed(yamls.changed(any_example, typo, 3)).keys() - before.keys()
        assert listed == {typo} or any(typo.startswith(f"{path}.") for path in before), parent


def test_the_text_is_laid_out_as_ruff_does(tmp_path, yamls):
    files = []
    for name, example in yamls.ALL.items():
        files.append(tmp_path / f"{name}_out.py")
        files[-1].write_text(yamls.convert(example(), tmp_path, "a_rather_long_name_" * 8).source)
    # As in configs/, whose functions have no docstrings either.
    for command in (["format", "--check"], ["check", "--ignore=D"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", "pyproject.toml"]
        done = subprocess.run([*ruff, *map(str, files)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", r"x\.yaml cannot be read as YAML: .*line 1"),
        ("3", r"x\.yaml should hold a mapping with the key model, not 3"),
        ("data: {target: x}", "the YAML has no section `model`"),
        ("model: {target: ldm.Foo}", "model.target names 'Foo', which is unknown; there are Diffu"),
        ("model: 3", "model = 3 should be a mapping of options"),
        ("model: {params: {}}", "model.target names '', which is unknown"),
        ("model: {target: x.DiffusionEngine}", "model.params.network_config is missing from the Y"),
        ("model: {target: x.LatentDiffusion}", "model.params.unet_config is missing from the YAML"),
        (
            "model: {target: x.LatentDiffusion, base_learning_rate: high, params: {unet_config: "
            "{target: x.UNetModel}}}",
            "model.base_learning_rate = 'high' should be int or float",
        ),
        ("model: {target: '${a.b}'}", r"\$\{a\.b\} refers to a key that is not in the file"),
        ("a: '${a}'\nmodel: {target: x}", r"\$\{a\} refers to itself"),
        (
            "model: {target: x.DiffusionEngine, params: {network_config: {target: y.VideoUNet}}}",
            "model.params.denoiser_config is missing from the YAML",
        ),
    ],
)
def test_what_cannot_be_converted_is_told_in_a_sentence(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config_from_yaml(path)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        config_from_yaml(tmp_path / "nowhere.yaml")
