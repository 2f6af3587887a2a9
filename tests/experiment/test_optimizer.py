"""The optimizer of a config: one list of choices, a schedule that multiplies, a warm-up for all."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.config.options import EmaOptions
from diffusion_jax.experiment.optimizer import bind_ema, build_optimizer
from diffusion_jax.train.ema import LateState
from diffusion_jax.train.power_ema import find_tracks


def rates(schedule, optimizer=None, steps=(0, 1, 4, 8), **options):
    section = {"name": "adamw", "learning_rate": 0.5} if optimizer is None else optimizer
    built = build_optimizer(section, schedule, 16, **{"scale_lr": False} | options)
    return [float(built.lr_at(step)) for step in steps]


def test_the_schedule_multiplies_the_learning_rate():
    assert rates(None) == rates({"name": "constant"}) == [0.5] * 4
    assert rates({"name": "constant", "value": 0.5}) == [0.25] * 4
    cosine = [0.5 * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in (0, 1, 4, 8)]
    np.testing.assert_allclose(rates({"name": "cosine_decay", "decay_steps": 8}), cosine, atol=1e-7)


def test_the_warm_up_goes_with_every_schedule():
    warm = {"name": "constant", "warmup_steps": 4}
    np.testing.assert_allclose(rates(warm), [0.125, 0.25, 0.5, 0.5])
    own = {"name": "warmup_constant", "warmup_steps": 8}  # which has a warm-up itself: from 0
    np.testing.assert_allclose(rates(own), [0.0, 0.0625, 0.25, 0.5])


def test_a_config_without_the_section_has_adamw_at_its_default_rate():
    default = rates(None, optimizer={"name": "adamw"})
    built = build_optimizer(None, None, 16, scale_lr=False)
    assert [float(built.lr_at(step)) for step in (0, 1, 4, 8)] == default
    np.testing.assert_allclose(
        rates(None, {"name": "adamw"}, scale_lr=True), np.multiply(16, default)
    )


@pytest.mark.parametrize("name", ["vae_kl_f8", "vq_f4"])
def test_first_stages_of_latent_diffusion_learn_at_its_rate(name):
    # 4.5e-6 for each image of the global batch: upstream's base_learning_rate with scale_lr.
    config = load_config(name).to_dict()
    built = build_optimizer(
        config["optimizer"], config["lr_schedule"], config["train"]["batch_size"],
        config["train"]["scale_lr"],
    )  # fmt: skip
    np.testing.assert_allclose(float(built.lr_at(10_000)), 4.5e-6 * 24, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        (
            {"name": "adamw", "learning_rat": 1.0},
            None,
            r"config\.optimizer\.learning_rat = 1\.0 is not an option; did you mean 'learning_rate'"
            r"\? choose from b1, b2, .*ema_decay, .*learning_rate, mu_dtype",
        ),
        ({"name": "adamw", "eps": "a"}, None, r"config\.optimizer\.eps = 'a' should be float"),
        ({"name": "adamw", "mask": 3}, None, r"config\.optimizer\.mask = 3 is not an option"),
        ({"name": "adma"}, None, r"config\.optimizer\.name = 'adma' is unknown; did you mean 'ada"),
        ({"name": "mechanize"}, None, r"name = 'mechanize' cannot be used: it wraps another"),
        ({"learning_rate": 1.0}, None, r"config\.optimizer\.name is missing; choose from"),
        (None, {"name": "cosine_decay"}, r"config\.lr_schedule\.decay_steps is missing"),
        (
            None,
            {"name": "constant", "warmup_step": 3},
            r"warmup_step = 3 is not an option; did you mean 'warmup_steps'\? choose from value, w",
        ),
        (None, {"name": "constant", "warmup_steps": 1.5}, r"warmup_steps = 1\.5 should be int"),
    ],
)
def test_mistakes_are_told_with_all_choices(optimizer, schedule, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(optimizer, schedule, 8, scale_lr=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "muon", "ns_steps": 1.5}, r"optimizer\.name = 'muon' makes no step with .*1\.5"),
        ({"name": "muon", "ns_coeffs": "x"}, r"optimizer\.name = 'muon' .*preset string: x$"),
        ({"name": "polyak_sgd", "variant": "x"}, r"'polyak_sgd' makes no step with .*variant='x'$"),
        ({"name": "adopt", "clip_value_fn": 3}, "clip_value_fn = 3 is not an option"),
    ],
)
def test_what_optax_would_say_late_is_told_at_once(section, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(section, None, 2, False)


def test_averages_of_any_length_are_kept_where_a_config_asks_for_them():
    assert bind_ema(None) == EmaOptions() and bind_ema(None).power == ()
    tx = build_optimizer(None, None, 1, scale_lr=False, ema=EmaOptions((0.05, 0.1))).tx
    assert len(find_tracks(tx.init({"w": jnp.zeros(2)})).tracks) == 2
    assert find_tracks(build_optimizer(None, None, 1, scale_lr=False).tx.init({})) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"power": (0.1, 0.05)}, r"config\.ema\.power = \(0\.1, 0\.05\) should be two or more len"),
        ({"power": (0.1, 0.5)}, r"config\.ema\.power"),
        ({"snapshots": -1}, r"config\.ema\.snapshots = -1 should be at least 0"),
        ({"snapshot_every": 0}, r"config\.ema\.snapshot_every = 0 should be at least 1"),
        ({"start_step": -1}, r"config\.ema\.start_step = -1 should be at least 0"),
        ({"update_every": 0}, r"config\.ema\.update_every = 0 should be at least 1"),
    ],
)
def test_lengths_that_do_not_fit_are_said(section, message):
    with pytest.raises(ConfigError, match=message):
        bind_ema(section)


def test_an_average_begins_later_where_a_config_says_so():
    tx = build_optimizer(None, None, 1, False, ema=EmaOptions(start_step=7, update_every=2)).tx
    assert isinstance(tx.init({"w": jnp.zeros(2)})["ema"], LateState)
    section = {"name": "adamw", "ema_decay": None}
    with pytest.raises(
        ConfigError, match=r"config.ema.start_step = 7 needs config.optimizer.ema_d"
    ):
        build_optimizer(section, None, 1, False, ema=EmaOptions(start_step=7))


def test_a_schedule_for_a_schedule_free_optimizer_is_refused():
    section = {"name": "schedule_free_adamw", "warmup_steps": 10}
    build_optimizer(section, None, 1, False)
    schedule = {"name": "cosine_decay", "decay_steps": 9}
    with pytest.raises(ValueError, match="'schedule_free_adamw' takes a constant learning rate on"):
        build_optimizer(section, schedule, 1, False)
    with pytest.raises(
        ValueError, match="schedule_free_adamw', .*schedule_free_sgd|schedule_free_a"
    ):
        build_optimizer({"name": "schedule_free"}, None, 1, False)
