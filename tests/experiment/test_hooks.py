"""The `hooks` and `checkpoint` sections: who gets which option, and what waits for what."""

import pytest
from support.experiments import built

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.hooks import ALWAYS, bind_hooks

SPLITS = {"train": "train", "validation": "validation"}


def bind(hooks=None, checkpoint=None, config="mnist"):
    sections = {"hooks": hooks, "checkpoint": checkpoint}
    return bind_hooks(sections, built(f"configs/{config}.py:tiny").task, SPLITS)


def test_what_watches_every_run_needs_no_section():
    found = bind()
    assert set(found.hooks) == set(ALWAYS) and "nan_stop" in ALWAYS
    assert all(options == {} for own in found.hooks.values() for options in own)
    assert found.checkpoint == {"every": 1000} and found.checkpoints == {}


def test_options_go_to_the_functions_that_take_them():
    found = bind(
        {
            "validation": {"every": 7, "num_batches": 2},
            "images": {"batch_frequency": 9, "log_every_t": 100},
        },
        {"every": 5, "keep_last": 3, "keep_best": 1, "monitor": "val/loss"},
    )
    assert found.hooks["validation"] == ({"every": 7}, {"num_batches": 2})
    assert found.hooks["images"] == ({"batch_frequency": 9}, {"log_every_t": 100})
    assert found.checkpoint == {"every": 5}
    assert found.checkpoints == {"keep_last": 3, "keep_best": 1, "monitor": "val/loss"}


def test_what_pictures_show_is_a_matter_of_the_model():
    shown = bind({"images": {"diff_boost_factor": 2.0}}, config="emoji_vae").hooks["images"]
    assert shown == ({}, {"diff_boost_factor": 2.0})
    with pytest.raises(ConfigError, match=r"images\.diff_boost_factor = 2\.0 is not an option"):
        bind({"images": {"diff_boost_factor": 2.0}})


@pytest.mark.parametrize(
    ("hooks", "checkpoint", "message"),
    [
        ({"valdation": {}}, None, r"config\.hooks\.valdation is not a section; did you mean 'val"),
        ({"scalars": {"stride": 2}}, None, r"config\.hooks\.scalars\.stride = 2 is not an option"),
        ({"scalars": {"writer": 2}}, None, r"config\.hooks\.scalars\.writer = 2 is not an option"),
        ({"images": {"split": "x"}}, None, r"config\.hooks\.images\.split = 'x' is not an option"),
        ({}, {"directory": "x"}, r"config\.checkpoint\.directory = 'x' is not an option"),
        (
            {},
            {"every": 5, "keep_every": 0},
            r"config\.checkpoint\.keep_every = 0 should be at least 1",
        ),
        (
            {},
            {"every": 5, "mode": "least"},
            r"config\.checkpoint\.mode = 'least' should be one of",
        ),
        (
            {"early_stopping": {"monitor": "metrics/mind_x", "patience": 1}, "validation": {}},
            None,
            r"config\.hooks\.early_stopping needs config\.hooks\.metrics, whose scores",
        ),
        (
            {"metrics": {"every": 5, "metrics": ("fid",)}},
            None,
            r"config\.hooks\.metrics\.metrics = 'fid' should have features = 'inception'",
        ),
        (
            {"metrics": {"every": 5, "features": "inception"}},
            None,
            r"config\.hooks\.metrics\.weights = None should be a file",
        ),
        (
            {"metrics": {"every": 5, "reference": "/nowhere.npz"}},
            None,
            r"config\.hooks\.metrics: there are no statistics at /nowhere\.npz",
        ),
        ({"early_stopping": {}}, None, r"config\.hooks\.early_stopping needs config\.hooks\.valid"),
        (
            {},
            {"every": 5, "keep_best": 1},
            r"config\.checkpoint\.keep_best needs config\.hooks",
        ),
    ],
)
def test_mistakes_name_the_path(hooks, checkpoint, message):
    with pytest.raises(ConfigError, match=message):
        bind(hooks, checkpoint)


@pytest.mark.parametrize("splits", ["=delete", "={}", ".validation=None"])
def test_validation_needs_a_split(splits):
    overrides = ("--config.hooks.validation.every=1", f"--config.data.splits{splits}")
    with pytest.raises(ConfigError, match=r"set config\.data\.splits\.validation"):
        built("configs/mnist.py:tiny", *overrides)


def test_metrics_and_levels_need_a_model_that_draws():
    for name in ("metrics", "levels"):
        with pytest.raises(ConfigError, match=rf"config\.hooks\.{name} needs a model that draws"):
            bind({name: {"every": 5}}, config="emoji_vae")


def test_a_hook_that_is_none_is_off():
    found = bind({"images": None, "progress": None, "scalars": {"every": 3}})
    assert set(found.hooks) == set(ALWAYS) - {"progress"}
    for name in ("hang", "signals"):
        with pytest.raises(ConfigError, match=rf"config\.hooks\.{name} = None should be a section"):
            bind({name: None})
