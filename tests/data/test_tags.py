"""Tags of captions: which stay, how often the others go, what their chance is a function of."""

from collections import Counter

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.tags import TagRule, changed, with_tags

CAPTION = "fox, red ,  snow, , tree"
RNG = np.random.default_rng(0)
SOURCE = [
    {"image": np.full((8, 8, 3), i, np.uint8), "caption": f"item{i}, a, b, c, d"} for i in range(8)
]
OPTIONS = dict(image_size=8, num_threads=0)


def test_without_chance_a_caption_is_its_tags():
    assert changed(TagRule(", ", 0, False, 0.0), CAPTION, 0, 0, 0) == "fox, red, snow, tree"
    assert changed(TagRule(" ", 0, False, 0.0), "a  b c", 0, 0, 0) == "a b c"
    assert changed(TagRule(", ", 0, True, 1.0), CAPTION, 0, 0, 0) == ""
    assert changed(TagRule(", ", 2, True, 1.0), CAPTION, 0, 0, 0) == "fox, red"
    assert changed(TagRule(", ", 9, True, 1.0), CAPTION, 0, 0, 0) == "fox, red, snow, tree"


def test_every_order_of_the_tags_that_are_not_kept_comes_as_often():
    rule = TagRule(", ", 1, True, 0.0)
    count = 3000
    orders = Counter(changed(rule, CAPTION, 7, step, 3) for step in range(count))
    assert len(orders) == 6 and all(order.startswith("fox, ") for order in orders)
    expected = count / 6
    assert all(abs(seen - expected) < 4 * np.sqrt(expected) for seen in orders.values())


def test_each_tag_is_left_out_with_its_probability_independently():
    rule = TagRule(", ", 1, False, 0.3)
    count = 4000
    found = [changed(rule, "x, a, b", 1, step, 0).split(", ") for step in range(count)]
    gone = np.array([["a" not in tags, "b" not in tags] for tags in found])
    assert np.all(np.abs(gone.mean(0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count))
    assert abs(np.corrcoef(gone.T)[0, 1]) < 0.07
    assert all(tags[0] == "x" for tags in found)


def test_captions_are_a_function_of_seed_step_and_row_of_the_global_batch():
    options = OPTIONS | dict(tags=", ", keep_tags=1, drop_tags=0.3)
    whole = make_batches(SOURCE, batch_size=4, seed=3, **options)
    batch = next(whole.iterate(5))
    again = next(make_batches(SOURCE, batch_size=4, seed=3, **options).iterate(5))
    np.testing.assert_array_equal(again["caption"], batch["caption"])
    half = make_batches(SOURCE, batch_size=4, seed=3, process_index=1, process_count=2, **options)
    np.testing.assert_array_equal(next(half.iterate(5))["caption"], batch["caption"][2:])
    plain = next(make_batches(SOURCE, batch_size=4, seed=3, **OPTIONS).iterate(5))
    np.testing.assert_array_equal(plain["image"], batch["image"])  # all else stays as it is
    for before, after in zip(plain["caption"], batch["caption"], strict=True):
        before, after = before.split(", "), after.split(", ")
        assert after[0] == before[0] and set(after) <= set(before)
    assert np.any(plain["caption"] != batch["caption"])
    # Each row and each step has numbers of its own.
    rule = TagRule(", ", 0, True, 0.0)
    ways = {
        changed(rule, "a, b, c, d, e, f, g, h", 3, step, row)
        for step in range(4)
        for row in range(4)
    }
    assert len(ways) == 16


def test_evaluation_shows_whole_captions_and_data_without_captions_stay():
    options = OPTIONS | dict(tags=", ", drop_tags=1.0)
    seen = next(eval_batches(SOURCE, batch_size=8, **options).iterate(0))
    assert seen["caption"].tolist() == [record["caption"] for record in SOURCE]
    rule = TagRule(", ", 0, True, 1.0)
    assert with_tags(lambda step: {"image": step}, rule, np.arange(2), 0, 5) == {"image": 5}


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_rule_or_one_that_does_nothing_leaves_captions(shuffle):
    rule = TagRule(", ", 5, shuffle, 0.5)
    batch = {"caption": np.array(["a, b, c"])}
    for given in (rule, None):
        found = with_tags(lambda step: batch, given, np.arange(1), 0, 0)
        assert found["caption"].tolist() == ["a, b, c"]


def test_one_caption_may_stand_for_all():
    for make in (make_batches, eval_batches):
        batch = next(make(SOURCE, batch_size=4, caption="a fox", **OPTIONS).iterate(0))
        assert batch["caption"].tolist() == ["a fox"] * 4
    silent = [{"image": record["image"]} for record in SOURCE]
    batch = next(make_batches(silent, batch_size=4, caption="a fox", **OPTIONS).iterate(0))
    assert batch["caption"].tolist() == ["a fox"] * 4
