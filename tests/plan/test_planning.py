"""What `plan` computes; tests/cli/test_plan.py plans a whole training step."""

from types import SimpleNamespace

import pytest

from diffusion_jax.plan import planning
from diffusion_jax.plan.planning import plan_config

MNIST = "configs/mnist.py:tiny"


def test_a_plan_that_does_not_fit_comes_with_the_problem(monkeypatch):
    plan = SimpleNamespace(fits=False, per_device_batch=4.0, total=9, held=(1, 2))
    monkeypatch.setattr(planning, "make_plan", lambda config, topology, batch: plan)
    monkeypatch.setattr(planning, "as_text", lambda plan: "the plan")
    monkeypatch.setattr(planning, "as_dict", lambda plan: {"total": plan.total})
    monkeypatch.setattr(planning, "advice", lambda config, topology, *sizes: f"try {sizes}")
    found = plan_config(MNIST, "cpu:2", per_device_batch=4)
    assert found[:2] == ("the plan", {"total": 9})
    assert found.problem == "configs/mnist.py:tiny does not fit cpu:2; try (4, 9, 3)"
    plan.fits = True
    assert plan_config(MNIST, "cpu:2").problem is None


def test_a_search_without_a_plan_is_a_problem(monkeypatch):
    monkeypatch.setattr(planning, "find_batches", lambda config, topology, policies: [])
    monkeypatch.setattr(planning, "table", lambda found: "no rows")
    found = plan_config(MNIST, "cpu:2", search=True)
    assert found == ("no rows", [], "not even one sample per device fits cpu:2")


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--per_device_batch=0 should be at least 1"):
        plan_config(MNIST, "cpu:2", per_device_batch=0)
