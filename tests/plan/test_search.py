"""The search for the largest batch finds it, in few tries."""

from types import SimpleNamespace

import pytest

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.plan import DoesNotFit, find_batches, find_topology, remat_policies, search
from diffusion_jax.plan.compiling import with_remat
from diffusion_jax.plan.report import table
from diffusion_jax.plan.search import largest_batch


@pytest.mark.parametrize("held", [0, 50, 99])
@pytest.mark.parametrize("each", [1, 7, 30])
def test_finds_the_largest_batch_of_an_affine_program_in_three_tries(held, each):
    tried = []

    def needed(batch):
        tried.append(batch)
        return held + each * batch

    assert largest_batch(needed, 100) == (100 - held) // each
    assert len(tried) <= 3 if (100 - held) // each < 5 else len(tried) <= 8
    assert len(tried) == len(set(tried))


def test_a_small_model_on_a_large_chip_takes_few_tries():
    tried = []

    def needed(batch):
        tried.append(batch)
        return 10_000_000 + 700_000 * batch

    assert largest_batch(needed, 24 * 2**30) == (24 * 2**30 - 10_000_000) // 700_000
    assert len(tried) <= 6


def test_finds_it_where_memory_bends():
    """As it does when the compiler computes things again by itself in the last gigabytes."""
    needed = lambda batch: 10 * batch - (batch**2) // 8
    best = max(batch for batch in range(1, 40) if needed(batch) <= 100)
    assert largest_batch(needed, 100) == best


def test_nothing_fits():
    assert largest_batch(lambda batch: 1000 * batch, 100) == 0


def test_only_one_fits():
    assert largest_batch(lambda batch: 60 * batch, 100) == 1


def test_the_policies_that_are_tried():
    assert remat_policies(load_config("configs/mnist.py", [])) == ["none", "dots", "full"]
    config = with_remat(load_config("configs/sdxl.py", []), "dots_saveable")
    assert remat_policies(config) == ["none", "dots", "dots_saveable", "full"]
    assert remat_policies(with_remat(config, True)) == ["none", "dots", "full"]


def test_a_device_of_unknown_size_cannot_be_filled():
    with pytest.raises(ValueError, match="'cpu:2' should be a TPU or GPU, with memory"):
        find_batches(load_config("configs/mnist.py:tiny", []), find_topology("cpu:2"), [False])


def test_each_policy_gets_its_batch_and_plan(monkeypatch):
    """Of 100 bytes, a sample takes 30, or 10 where all is computed again."""

    def make_plan(config, topology, batch):
        size = (10 if config.model.remat else 30) * batch
        if size > topology.memory:
            raise DoesNotFit("too large", size, topology.memory)
        return SimpleNamespace(total=size)

    monkeypatch.setattr(search, "make_plan", make_plan)
    topology = find_topology("h100:2")._replace(memory=100)
    found = find_batches(load_config("configs/mnist.py:tiny", []), topology, [False, True])
    assert [(f.remat, f.per_device_batch, f.plan.total) for f in found] == [
        (False, 3, 90),
        (True, 10, 100),
    ]


def test_what_does_not_fit_at_all_is_told():
    small = find_topology("h100:2")._replace(memory=1000)
    found = find_batches(load_config("configs/mnist.py:tiny", []), small, [False, True])
    assert [entry.per_device_batch for entry in found] == [0, 0]
    assert table(found).count("none fits") == 2
