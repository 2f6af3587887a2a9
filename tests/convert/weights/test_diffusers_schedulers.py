"""Scheduler configs for diffusers: what is written, and what is refused."""

import pytest

from diffusion_jax.convert.weights.diffusers_schedulers import (
    edm_scheduler_config,
    flow_scheduler_config,
    scheduler_config,
)


def test_schedules():
    config = scheduler_config(beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    assert config["beta_schedule"] == "scaled_linear"
    assert config["prediction_type"] == "v_prediction"
    other = scheduler_config(beta_start=1e-4, beta_end=2e-2, schedule="sqrt_linear")
    assert other["beta_schedule"] == "linear"
    with pytest.raises(
        ValueError, match="schedule 'cosine' is unknown to diffusers; it has linear"
    ):
        scheduler_config(beta_start=0.1, beta_end=0.2, schedule="cosine")


def test_continuous_denoisers_and_flows_have_schedulers_of_their_own():
    levels = {"sigma_min": 0.002, "sigma_max": 700.0, "sigma_data": 0.5}
    edm = edm_scheduler_config("edm", **levels)
    v = edm_scheduler_config("v_edm", **levels)
    assert (edm["prediction_type"], edm["sigma_data"]) == ("epsilon", 0.5)
    assert (v["prediction_type"], v["sigma_data"]) == ("v_prediction", 1.0)
    assert edm["sigma_max"] == 700.0 and edm["_class_name"] == "EDMEulerScheduler"
    flow = flow_scheduler_config(3.0)
    assert (flow["_class_name"], flow["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)
