"""Batches and learning rates of the lightning stanza."""

import pytest


def test_devices_and_micro_batches_make_the_global_batch(yamls):
    tree = yamls.changed(yamls.mnist_cond(), "lightning.trainer.devices", "0,1,2,")
    tree = yamls.changed(tree, "lightning.trainer.accumulate_grad_batches", 2)
    train = yamls.parts(tree)[0][0]["train"]
    assert (train["batch_size"], train["accumulate"]) == (512 * 3 * 2, 2)


def test_a_learning_rate_schedule_is_the_same_function(tmp_path, yamls):
    built = yamls.build(yamls.load(yamls.imagenet_f8(), tmp_path))
    rates = [float(built.task.lr_at(step)) for step in (0, 5000, 10_000, 90_000)]
    ramp = 1e-4 * (1e-6 + (1 - 1e-6) * 0.5)
    assert rates == pytest.approx([1e-4 * 1e-6, ramp, 1e-4, 1e-4], rel=1e-5)
