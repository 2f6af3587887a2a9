"""Seeds of drawn images: one for all or one for each, and variations; bad ones are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.randomness import sample_keys, seed_key
from diffusion_jax.runs.inputs.seeds import Seeds, check_seeds, checked_seed, read_seeds

ROWS = np.array([2, 0, 1, 1])


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_one_seed_numbers_its_images_and_several_have_one_each():
    want = sample_keys(seed_key(7), jnp.asarray(ROWS))
    np.testing.assert_array_equal(data(check_seeds(7).keys(ROWS)), data(want))
    found = data(check_seeds([5, -6, 2**40]).keys(ROWS))
    for row, seed in zip(found, (2**40, 5, -6, -6), strict=True):
        np.testing.assert_array_equal(row, data(sample_keys(seed_key(seed), jnp.zeros(1, int)))[0])


def test_variations_have_other_keys_and_a_strength():
    seeds = check_seeds([5, 5, 5], 9, 0.25)
    varied = seeds.varied(ROWS)["variation"]
    np.testing.assert_array_equal(data(varied.keys), data(check_seeds(9).keys(ROWS)))
    np.testing.assert_array_equal(varied.strength, np.full(4, 0.25, np.float32))
    assert check_seeds(3).varied(ROWS) == {}


def test_the_ends_of_a_variation_are_the_seeds_themselves():
    assert check_seeds(3, 9, 0.0) == Seeds(3) and check_seeds(3, [9, 8], 1) == Seeds((9, 8))


def test_seeds_say_how_many_images_there_are():
    assert check_seeds(np.array([1, 2])).images_of("a fox") == 2
    assert check_seeds(0, [1, 2, 3], 0.5).images_of(None) == 3
    assert check_seeds(0).images_of("a fox") is None
    assert check_seeds([1, 2]).images_of(["a fox", "an owl"]) is None
    check_seeds([1, 2]).check(2, ())
    with pytest.raises(
        ValueError, match=r"seed = \[1, 2\] should have one number for each image, a"
    ):
        check_seeds([1, 2]).check(3, ())
    with pytest.raises(ValueError, match=r"variation_seed = \[1\] should have one number for each"):
        check_seeds(0, [1], 0.5).check(2, ())
    with pytest.raises(
        ValueError, match="variation_seed goes with seed, and noise is given instea"
    ):
        check_seeds(0, 1, 0.5).check(2, {"noise"})


def test_an_image_tells_its_seed():
    assert check_seeds(7).of_image(3) == (7, 3) and check_seeds([7, 8]).of_image(1) == (8, 0)
    assert check_seeds(7).facts(0) == {}
    found = check_seeds(7, [1, 2], 0.5).facts(1)
    assert found == {"Variation seed": 2, "Variation seed strength": 0.5}


def test_a_model_of_views_has_one_seed():
    assert check_seeds(7).alone() == 7
    for seeds in (check_seeds([7]), check_seeds(7, 8, 0.5)):
        with pytest.raises(ValueError, match="this model draws views of a video, which share one"):
            seeds.alone()


def test_no_seed_is_drawn_and_logged(caplog):
    drawn = checked_seed(None)
    assert caplog.messages == [f"seed = {drawn} was drawn"] and 0 <= drawn < 2**32


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((1.5,), "seed = 1.5 should be a whole number"),
        (([1, 2.5],), "seed = 2.5 should be a whole number"),
        (([],), r"seed = \[\] should be a whole number, or one for each image"),
        ((0, 1), "variation_seed needs variation_strength beside it"),
        ((0, None, 0.5), "variation_strength needs variation_seed beside it"),
        ((0, 1, 1.5), "variation_strength = 1.5 should be between 0 and 1"),
        ((0, 1, float("nan")), "variation_strength = nan should be a finite number"),
        ((0, "x", 0.5), "variation_seed = 'x' should be a whole number"),
    ],
)
def test_bad_seeds_are_named(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_seeds(*given)


def test_seeds_of_a_command_line():
    assert read_seeds(0, "--seed") == 0 and read_seeds("-3", "--seed") == -3
    assert read_seeds("1,2,3", "--seed") == [1, 2, 3]
    with pytest.raises(ValueError, match="--seed=1;2 should be a whole number, or a list: 1,2,3"):
        read_seeds("1;2", "--seed")
