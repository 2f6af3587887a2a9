"""Clips train alike on any devices and in micro-batches; the loss sees their first frame."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.frames import FRAME, NOISED_FRAME
from diffusion_jax.experiment.video import on_clips
from diffusion_jax.train.step import jit_train_step

TINY = "configs/moving_digits.py:tiny"
build = functools.partial(built, TINY)


def host_batch(seed=0, size=8):
    generator = np.random.default_rng(seed)
    still = np.zeros((size, 4), np.float32)
    still[:2] = 1.0  # two rows are images
    return {
        "image": generator.uniform(-1, 1, (size, 4, 16, 16, 3)).astype(np.float32),
        "fps_id": np.full((size, 1), 6.0, np.float32),
        "motion_bucket_id": generator.uniform(0, 255, (size, 1)).astype(np.float32),
        "image_only_indicator": still,
        "caption": np.array(["not a number"] * size),
    }


def losses(experiment, steps=2):
    state = experiment.init_state()
    step_fn = jit_train_step(experiment.train_step, experiment.abstract_state())
    frozen, found = experiment.random_frozen(), []
    for step in range(steps):
        state, metrics = step_fn(state, experiment.to_devices(host_batch(step)), frozen)
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.fixture(scope="module")
def one_device():
    return losses(build(), steps=4)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        ("mesh.data=2",),
        ("mesh.data=4",),
        ("mesh.data=8",),
        ("mesh.context=2",),
        ("mesh.context=4",),
        ("mesh.data=2", "mesh.context=4"),
        ("mesh.data=2", "mesh.context=2", "mesh.fsdp=2", "train.accumulate=2"),
    ],
    ids=" ".join,
)
def test_the_loss_curve_is_that_of_one_device(one_device, split):
    """Devices share the rows of a batch ("data"), the frames of each ("context"), or parameters."""
    mesh = [int(option.partition("=")[2]) for option in split if option.startswith("mesh.")]
    experiment = build(*(f"--config.{option}" for option in split), devices=math.prod(mesh))
    found, _ = losses(experiment, steps=4)
    print(f"losses within {np.abs(found / one_device - 1).max():.1e}")
    np.testing.assert_allclose(found, one_device, rtol=5e-5)


@pytest.mark.slow
def test_only_layers_that_mix_frames_train():
    experiment = build("--config.train.trainable=time_")
    before = experiment.init_state().params
    _, state = losses(experiment, steps=1)
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    paths = jax.tree_util.tree_leaves_with_path(changed)
    by_name = {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in paths}
    assert not [name for name, change in by_name.items() if change and "time_" not in name]
    assert sum(by_name.values()) > 10


@pytest.mark.slow
def test_images_among_videos_are_told_to_the_network():
    """Rows marked as images are computed without the layers over time."""
    experiment = build()
    params = drawn(experiment.abstract_state().params)
    network, frozen = experiment.network, experiment.random_frozen()
    batch = {k: jnp.asarray(v) for k, v in host_batch().items() if k != "caption"}
    batch = network.with_conditioning_frame(batch, jax.random.split(jax.random.key(0), 8))
    apply = jax.jit(network.apply)

    def shown(order):
        x, t = jnp.asarray(batch["image"])[:, order], jnp.zeros(8)
        out = apply(params, x, t, network.embed(params, frozen, batch))
        return np.asarray(out)[:, np.argsort(order)]

    forward, shuffled = shown(np.arange(4)), shown(np.array([2, 0, 3, 1]))
    np.testing.assert_allclose(shuffled[:2], forward[:2], rtol=1e-4, atol=1e-4)
    assert np.abs(shuffled[2:] - forward[2:]).max() > 1e-2


def test_the_loss_sees_the_frame_and_draws_it_alike_in_training_and_evaluation():
    seen = []
    experiment = build()
    loss = on_clips(experiment.network, lambda *args, train: seen.append((args[3], train)))
    keys = jax.random.split(jax.random.key(0), 8)
    batch = {"image": jnp.asarray(host_batch()["image"])}
    for train in (True, False):
        loss({}, {}, {}, batch, keys, train=train)
    (first, was_training), (second, _) = seen
    assert was_training and first[FRAME].shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(first[NOISED_FRAME], second[NOISED_FRAME])


@pytest.mark.parametrize(
    ("path", "override", "message"),
    [
        (
            "moving_digits",
            "data.batches.num_frames=None",
            "video_unet.*denoises clips of video; set .*num_frames",
        ),
        ("mnist", "data.batches.num_frames=4", "'unet' denoises images, and .*num_frames = 4"),
        ("mnist", "guidance.name=linear", "'linear' has a scale for each frame of a video"),
        ("emoji_vae", "data.batches.num_frames=4", "num_frames = 4 makes clips of video; the trai"),
        ("mnist", "train.trainable='('", "trainable = '\\(' should be a regular expression"),
    ],
)
def test_what_does_not_fit_is_refused(path, override, message):
    with pytest.raises(ConfigError, match=message):
        built(f"configs/{path}.py:tiny", f"--config.{override}")


@pytest.mark.slow
def test_pictures_have_a_row_of_frames_for_each_clip():
    experiment = build()
    state, frozen = drawn(experiment.abstract_state()), trained(TINY).frozen
    shown = experiment.task.pictures(frozen, max_images=2)(state, host_batch())
    assert shown["inputs"].shape == shown["samples"].shape == (2, 4, 16, 16, 3)
    assert shown["denoise_row"].shape[2:] == (16, 16, 3)
    assert shown["diffusion_row"].shape[2:] == (16, 16, 3)
    np.testing.assert_array_equal(shown["clips"], shown["samples"])
