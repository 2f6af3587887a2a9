"""Random masks: a function of (seed, step, row), of every kind, in the batches of training."""

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.masks import DRAWS, KINDS, check_kinds, draw_masks

RNG = np.random.default_rng(0)
SOURCE = [{"image": RNG.integers(0, 256, (16, 24, 3)).astype(np.uint8)} for _ in range(8)]
OPTIONS = dict(image_size=(16, 24), num_threads=0)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_holes_of_many_sizes(kind):
    masks = draw_masks([kind], (32, 48), RNG.random((200, DRAWS)))
    assert masks.shape == (200, 32, 48, 1) and masks.dtype == np.float32
    assert set(np.unique(masks)) <= {0.0, 1.0}
    holes = 1.0 - masks.mean((1, 2, 3))
    if kind == "everything":
        assert np.all(holes == 1.0)
    else:
        assert 0.0 < holes.min() < 0.1 and 0.3 < holes.max() <= 1.0 and holes.std() > 0.05
        # No place is left out, and none is always taken.
        assert 0.0 < masks.mean(0).min() and masks.mean(0).max() < 1.0


def test_a_box_has_the_sides_that_were_drawn():
    """One box, 0.1 + 0.5 x 0.8 of the sides, at the far corner."""
    draws = np.zeros((1, DRAWS))
    draws[0, 2:6] = [0.999999, 0.0, 0.8, 0.0]  # place and share, of the width and of the height
    (mask,) = draw_masks(["boxes"], (20, 20), draws)[..., 0]
    want = np.ones((20, 20))
    want[:2, 10:] = 0.0
    np.testing.assert_array_equal(mask, want)


def test_each_kind_is_taken_as_often():
    draws = RNG.random((400, DRAWS))
    masks = draw_masks(["everything", "boxes"], (16, 16), draws)
    whole = np.sum(masks.reshape(400, -1).max(1) == 0.0)
    assert 150 < whole < 250


def test_masks_of_batches_are_a_function_of_seed_step_and_row():
    options = OPTIONS | dict(masks=("boxes", "strokes"))
    whole = make_batches(SOURCE, batch_size=4, seed=3, **options)
    batch = next(whole.iterate(5))
    np.testing.assert_array_equal(batch["masked_image"], batch["mask"] * batch["image"])
    again = make_batches(SOURCE, batch_size=4, seed=3, **options)
    np.testing.assert_array_equal(next(again.iterate(5))["mask"], batch["mask"])
    half = make_batches(SOURCE, batch_size=4, seed=3, process_index=1, process_count=2, **options)
    np.testing.assert_array_equal(next(half.iterate(5))["mask"], batch["mask"][2:])
    for other in (whole.iterate(6), make_batches(SOURCE, batch_size=4, **options).iterate(5)):
        assert np.any(next(other)["mask"] != batch["mask"])
    # Without masks all else stays as it is.
    plain = next(make_batches(SOURCE, batch_size=4, seed=3, **OPTIONS).iterate(5))
    assert "mask" not in plain
    np.testing.assert_array_equal(plain["image"], batch["image"])
    seen = next(eval_batches(SOURCE, batch_size=4, **options).iterate(0))
    assert seen["mask"].shape == (4, 16, 24, 1)


def test_unknown_kinds_and_clips_are_refused():
    with pytest.raises(ValueError, match="masks = 'box' is unknown; choose from boxes, strokes"):
        check_kinds(["box"])
    with pytest.raises(
        ValueError, match=r"masks = \('boxes',\) are for images, and num_frames = 2"
    ):
        make_batches(SOURCE, batch_size=4, **OPTIONS, masks=("boxes",), num_frames=2)
