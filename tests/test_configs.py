"""Every shipped config, in every variant, builds abstractly; every kind of mistake in one is told
in a sentence."""

import pathlib

import jax
import pytest

from diffusion_jax.build import experiment
from diffusion_jax.build.binding import ConfigError
from diffusion_jax.cli.arguments import load_config

CONFIGS = sorted(pathlib.Path("configs").glob("*.py"))
VARIANTS = [f"{path}{variant}" for path in CONFIGS for variant in ("", ":tiny")]


@pytest.mark.parametrize("path", VARIANTS)
def test_every_config_builds_and_its_step_traces(path):
    built = experiment(load_config(path, ["--config.train.batch_size=8"]))
    state = built.abstract_state()
    height, width, channels = built.network.image_shape
    inputs = jax.eval_shape(lambda: built.network.example_inputs(8))
    image = jax.ShapeDtypeStruct((8, height, width, channels), "float32")
    new, metrics = jax.eval_shape(built.train_step, state, {"image": image, **inputs}, built.frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


MISTAKES = [
    (
        "--config.train.num_step=3",
        r"config\.train\.num_step = 3 is not an option; did you mean 'num_s",
    ),
    ("--config.trian.num_steps=3", r"config\.trian is not a section; did you mean 'train'"),
    ("--config.train.accumulate=two", r"config\.train\.accumulate = 'two' should be int"),
    ("--config.model.num_classes=5", r"config\.model\.num_classes = 5 should be 11"),
    ("--config.model.name=unett", r"config\.model\.name = 'unett' is unknown; did you mean 'unet'"),
    ("--config.sampler.name=dim", r"config\.sampler\.name = 'dim' is unknown.*ddim"),
    ("--config.guidance.name=cgf", r"config\.guidance\.name = 'cgf' is unknown.*cfg"),
    (
        "--config.schedule.name=cosin",
        r"config\.schedule\.name = 'cosin' is unknown.*did you mean 'cosine'",
    ),
    (
        "--config.loss.loss_type=l3",
        r"config\.loss\.loss_type = 'l3' should be one of 'l2', 'l1', 'huber'",
    ),
    ("--config.optimizer.name=adamww", r"optimizer\.name='adamww' is unknown.*adamw"),
    ("--config.lr_schedule.name=cosin", r"config\.lr_schedule\.name = 'cosin' is unknown"),
    ("--config.conditioning.key=amd", r"config\.conditioning\.key = 'amd' is unknown.*adm"),
    ("--config.train.batch_size=12", r"config\.train\.batch_size = 12 should be a multiple of 8"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_wrong_value_is_told_with_path_value_and_choices(override, message):
    config = load_config("configs/mnist.py:tiny", [override])
    with pytest.raises(ValueError, match=message):
        experiment(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.chanels", 3, r"config\.model\.chanels = 3 is not an option; did you mean"),
        ("optimiser", 1, r"config\.optimiser is not a section; did you mean 'optimizer'"),
        (
            "train.batchsize",
            3,
            r"config\.train\.batchsize = 3 is not an option; did you mean 'batch_size'",
        ),
        (
            "data.batches.image_sise",
            3,
            r"image_sise = 3 is not an option; did you mean 'image_size'",
        ),
        ("data.splits.trian", "x", r"config\.data\.splits\.trian = 'x' is not an option"),
        ("optimizer.beta1", 0.9, r"optimizer\.beta1=0\.9 is no option of adamw"),
        (
            "conditioning.embedders.label.classes",
            3,
            r"embedders\.label\.classes = 3 is not an option",
        ),
        ("hooks.scalar", 3, r"config\.hooks\.scalar is not a section; did you mean 'scalars'"),
        ("checkpoint.keep", 3, r"config\.checkpoint\.keep = 3 is not an option"),
    ],
)
def test_an_unknown_key_is_told_with_path_and_choices(path, value, message):
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    with pytest.raises(ValueError, match=message):
        experiment(config)


def test_a_missing_section_is_named():
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        del config.data
    with pytest.raises(ConfigError, match=r"config\.data is missing"):
        experiment(config)
