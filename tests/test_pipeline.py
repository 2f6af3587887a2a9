"""The sampling API: deterministic per image, guided, inpainting, and honest about bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.experiments import built, trained

from diffusion_jax import Pipeline, load_config, make_experiment
from diffusion_jax.pipeline import NonFiniteWarning
from diffusion_jax.runs.drawing.watched import Stopped


def random_pipe(path, *overrides):
    """A tiny model with random weights that are nowhere 0: zeros would hide everything."""
    weights = trained(path, *overrides)
    return Pipeline(built(path, *overrides), weights.params, weights.frozen)


@pytest.fixture(scope="module")
def pipe():
    return random_pipe("configs/mnist.py:tiny", "--config.sampler.num_steps=3")


def test_images_are_pixels(pipe):
    images = pipe([1, 2, 3])
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.uint8
    assert images.std() > 10


def test_image_i_depends_on_seed_and_i_only(pipe):
    whole = pipe([1, 2, 3, 4, 5], seed=3).astype(int)
    chunked = pipe([1, 2, 3, 4, 5], seed=3, batch_size=2).astype(int)
    fewer = pipe([1, 2], seed=3).astype(int)
    # Programs for different batch sizes may round differently, by one grey level at the most.
    assert np.abs(whole - chunked).max() <= 1
    assert np.abs(whole[:2] - fewer).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 20
    assert np.abs(pipe([1, 2], seed=4).astype(int) - fewer).max() > 20
    np.testing.assert_array_equal(pipe([1, 2], seed=3), fewer)


def test_a_seed_for_each_image_is_the_first_image_of_that_seed(pipe):
    found = pipe([1, 2, 3], seed=[5, 6, 5]).astype(int)
    for row, (label, seed) in enumerate(((1, 5), (2, 6), (3, 5))):
        assert np.abs(found[row] - pipe([label], seed=seed)[0]).max() <= 1
    np.testing.assert_array_equal(pipe(1, seed=[5, 6]), pipe([1, 1], seed=[5, 6]))
    with pytest.raises(ValueError, match=r"seed = \[5, 6\] should have one number for each image"):
        pipe([1, 2, 3], seed=[5, 6])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_variation_goes_from_one_seed_to_the_other(pipe, eta):
    """Also with a sampler that draws noise in its steps."""
    config = load_config(
        "configs/mnist.py:tiny", ["--config.sampler.num_steps=3", f"--config.sampler.eta={eta}"]
    )
    drawing = pipe._replace(experiment=make_experiment(config, devices=jax.devices()[:1]))
    draw = lambda strength: drawing(  # noqa: E731
        [1, 2], seed=3, variation_seed=8, variation_strength=strength, output="latents"
    )
    start, end = (drawing([1, 2], seed=seed, output="latents") for seed in (3, 8))
    np.testing.assert_array_equal(draw(0.0), start)
    np.testing.assert_array_equal(draw(1.0), end)
    np.testing.assert_allclose(draw(1e-6), start, atol=1e-3)
    np.testing.assert_allclose(draw(1 - 1e-6), end, atol=1e-3)
    near, far = (np.abs(draw(strength) - start).mean() for strength in (0.1, 0.5))
    assert 0.0 < near < far
    with pytest.raises(
        ValueError, match="variation_seed goes with seed, and noise is given instea"
    ):
        drawing([1], variation_seed=8, variation_strength=0.5, noise=np.zeros((1, 28, 28, 1)))


def test_guidance_changes_the_image_and_one_is_none(pipe):
    plain, strong = pipe([1], guidance_scale=1.0), pipe([1], guidance_scale=6.0)
    assert np.abs(plain.astype(int) - strong.astype(int)).max() > 5
    almost = pipe([1], guidance_scale=1.0 + 1e-6)
    assert np.abs(plain.astype(int) - almost.astype(int)).max() <= 1


def test_inpainting_keeps_what_the_mask_keeps(pipe):
    image = np.full((28, 28, 1), 255, np.uint8)
    mask = np.zeros((28, 28, 1), np.float32)
    mask[:14] = 1.0
    images = pipe([1, 2], image=image, mask=mask, num_steps=20)
    free = pipe([1, 2], num_steps=20)
    assert np.all(images[:, :14] == 255) and images[:, 14:].std() > 10
    # What is drawn knows of what is kept.
    assert np.abs(images[:, 14:].astype(int) - free[:, 14:]).mean() > 2


@pytest.mark.parametrize("scale", [1.0, [2.0, 2.0, 1.5, 1.0]])
def test_an_image_is_inverted_and_drawn_again(pipe, scale):
    """Random weights and images that no model would draw; one iteration is not enough for them."""
    unclipped = built("configs/mnist.py:tiny", "--config.sampler.clip_denoised=False")
    exact = pipe._replace(experiment=unclipped)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    options = dict(guidance_scale=scale, num_steps=4)
    x = exact.invert(images, [1, 2], iterations=12, **options)
    assert x.shape == (2, 28, 28, 1) and x.dtype == np.float32
    again = exact([1, 2], latents=x, **options)
    assert np.abs(again.astype(int) - images).max() <= 1
    rough = exact([1, 2], latents=exact.invert(images, [1, 2], iterations=1, **options), **options)
    assert np.abs(rough.astype(int) - images).max() > 20
    # Where the way back stops, the way there begins.
    half = exact.invert(images, [1, 2], denoising_start=0.5, iterations=12, **options)
    again = exact([1, 2], latents=half, denoising_start=0.5, **options)
    assert np.abs(again.astype(int) - images).max() <= 1


def test_shares_of_the_steps_are_rounded_to_the_nearest(pipe):
    """0.6 of 3 steps are 2, and 0.4 are 1."""
    options = dict(n=1, output="latents", seed=1)
    two = pipe(3, denoising_end=2 / 3, **options)
    np.testing.assert_array_equal(pipe(3, denoising_end=0.6, **options), two)
    end = pipe(3, latents=two, denoising_start=0.6, **options)
    assert np.abs(pipe(3, latents=two, denoising_start=0.4, **options) - end).max() > 1e-3
    np.testing.assert_allclose(end, pipe(3, **options), atol=1e-5)


def test_noise_in_place_of_the_seed(pipe):
    noise = np.random.default_rng(0).standard_normal((2, 28, 28, 1))
    images = pipe([1, 1], noise=noise, seed=5)
    np.testing.assert_array_equal(images, pipe([1, 1], noise=noise, seed=6))
    np.testing.assert_array_equal(images[:1], pipe(1, noise=noise[:1]))
    # The sampler is ddim, so x_T is the noise; and it draws none in its steps.
    np.testing.assert_array_equal(images, pipe([1, 1], latents=noise))
    steps = np.zeros((2, 3, 28, 28, 1))
    np.testing.assert_array_equal(images, pipe([1, 1], noise=noise, step_noise=steps))


def test_seeds_are_any_integers_and_none_draws_one(pipe, caplog):
    want = pipe([1], seed=3)
    for seed in (np.int64(3), np.uint32(3), jnp.int32(3)):
        np.testing.assert_array_equal(pipe([1], seed=seed, num_steps=np.int64(3)), want)
    others = [pipe([1], seed=seed) for seed in (-3, 3 + 2**32, 2**70)]
    assert all(np.abs(other.astype(int) - want).max() > 20 for other in others)
    drawn = pipe([1], seed=None)
    seed = int(caplog.records[-1].getMessage().removeprefix("seed = ").removesuffix(" was drawn"))
    np.testing.assert_array_equal(pipe([1], seed=seed), drawn)


def test_a_scale_of_zero_is_said(pipe, caplog):
    zero = pipe([1], guidance_scale=0)
    assert "guidance_scale = 0 ignores the conditions; 1 is without guidance" in caplog.text
    np.testing.assert_array_equal(zero, pipe([2], guidance_scale=0))


def test_pictures_of_any_form_are_taken(pipe, caplog):
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1)).astype(np.uint8)
    mask = np.zeros((28, 28), np.uint8)
    mask[:14] = 255
    want = pipe([1], image=image, mask=mask[..., None] / 255)
    forms = (mask, Image.fromarray(mask), np.repeat(mask[..., None], 3, -1), mask.astype(bool))
    for form in forms:
        np.testing.assert_array_equal(pipe([1], image=image, mask=form), want)
    np.testing.assert_array_equal(pipe([1], image=Image.fromarray(image[..., 0]), mask=mask), want)
    larger = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    np.testing.assert_array_equal(pipe([1], image=image, mask=larger), want)
    assert "mask is 56 x 56 pixels and is resized to 28 x 28" in caplog.text
    small = pipe([1], image=np.full((7, 7, 1), 200, np.uint8), mask=mask)
    assert np.all(small[0, :14] == 200) and "image is 7 x 7 pixels and is res" in caplog.text


def test_an_image_of_any_size_gives_one_of_any_size(pipe, caplog):
    """The network works on multiples of its factor, and what is too much is cut off."""
    image = np.random.default_rng(0).integers(0, 256, (20, 50)).astype(np.uint8)
    options = dict(image=image, height=27, width=25, resize="crop")
    drawn = pipe([1, 2], strength=0.5, **options)
    assert drawn.shape == (2, 27, 25, 1)
    assert "image is 20 x 50 pixels and is cropped to 27 x 25" in caplog.text
    whole = Image.fromarray(image[:, 15:34]).resize((25, 27), Image.Resampling.BICUBIC)
    kept = pipe([1], mask=np.ones((20, 50)), **options)
    np.testing.assert_array_equal(kept[0, ..., 0], np.asarray(whole))


def test_models_that_read_images_say_what_is_missing(pipe):
    def reading(variant):
        return random_pipe(f"configs/sd15.py:{variant}")

    with pytest.raises(
        ValueError, match="image = None should be given: this model edits images by"
    ):
        reading("edit_tiny")("make it red")
    with pytest.raises(ValueError, match="mask = None should be given: this model completes image"):
        reading("inpaint_tiny")("a fox", image=np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"image_guidance_scale = 1.5 does not fit: it is for mod"):
        pipe([1], image_guidance_scale=1.5)


def test_images_that_are_not_finite_are_counted_and_named(pipe):
    params = jax.tree.map(lambda leaf: leaf * np.nan, pipe.params)
    with pytest.warns(NonFiniteWarning, match="2 of 2 images hold NaN or infinity.*: 0, 1"):
        images = pipe._replace(params=params)([1, 2])
    assert images.shape == (2, 28, 28, 1) and images.dtype == np.uint8


def test_a_pipeline_is_not_traced(pipe):
    with pytest.raises(ValueError, match="seed is traced by JAX.*outside of jax.jit"):
        jax.jit(lambda seed: pipe([1], seed=seed))(3)


def test_its_repr_is_a_line(pipe):
    count = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
    assert repr(pipe) == (
        f"Pipeline(UNet with {count:,} parameters, conditions: label, images 28 x 28 x 1, 3 steps)"
    )


def test_one_condition_can_be_repeated(pipe):
    assert len(pipe(4, n=3)) == 3 and len(pipe(["4"], n=2)) == 2
    assert pipe.num_classes() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(conditions=[10]), "class 10 is out of range"),
        (dict(conditions=None), "this model is conditional"),
        (dict(conditions=[1], num_steps=0), "num_steps = 0"),
        (dict(conditions=[1], num_steps=1001), "num_steps = 1001"),
        (dict(conditions=[1], batch_size=0), "batch_size = 0 should be at least 1"),
        (
            dict(conditions=[1], guidance_scale=[1, 2]),
            r"guidance_scale has the shape \(2,\).* or 3",
        ),
        (dict(conditions=[1], noise=np.zeros((28, 28, 1))), r"noise has shape .* \(1, 28, 28, 1\)"),
        (dict(conditions=[1], step_noise=np.zeros((1, 28, 28, 1))), r"be \(1, 3, 28, 28, 1\)"),
        (dict(conditions=[1], image=np.zeros((28, 28, 1), np.uint8)), "an image needs strength"),
        (dict(conditions=[1], mask=np.zeros((28, 28, 1))), "needs both image and mask"),
        (
            dict(conditions=[1], image=np.zeros((28, 28, 1)), mask=np.zeros((28, 28, 1))),
            "float64; it should be uint8",
        ),
        (
            dict(conditions=[1], image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((28, 28, 1))),
            r"image has shape \(8, 8, 3\); it should be \(28, 28, 1\)",
        ),
        (dict(conditions=[1], seed=1.5), "seed = 1.5 should be a whole number"),
        (dict(conditions=[1], seed="3"), "seed = '3' should be a whole number"),
        (dict(conditions=[1], num_steps="3"), "num_steps = '3' should be a whole number"),
        (dict(conditions=[1], batch_size=1.5), "batch_size = 1.5 should be a whole number"),
        (dict(conditions=[1], height=28.0), "height = 28.0 should be a whole number"),
        (dict(conditions=1, n="2"), "n = '2' should be a whole number"),
        (dict(conditions=[1], guidance_scale="3"), "guidance_scale = '3' should be one number or"),
        (dict(conditions=[1], guidance_scale=float("nan")), "guidance_scale = nan should be fin"),
        (dict(conditions=[1], denoising_end="1"), "denoising_end = '1' should be a finite number"),
        (
            dict(conditions=[1], image=np.zeros((28, 28, 1), np.uint8), strength=float("nan")),
            "strength = nan should be a finite number",
        ),
        (
            dict(conditions=[1], latents=np.full((1, 28, 28, 1), np.nan)),
            "latents has 784 of 784 values that are not finite numbers",
        ),
    ],
)
def test_bad_input_is_one_sentence(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(images=np.zeros((28, 28), np.uint8)),
            r"shape \(28, 28\); it should be \[B, H, W, C\]",
        ),
        (dict(images=np.zeros((2, 28, 28, 1))), "dtype float64; it should be uint8"),
        (dict(iterations=0), "iterations = 0 should be at least 1"),
        (dict(denoising_start=1.0), "denoising_start = 1.0, denoising_end = 1.0 should be two num"),
    ],
)
def test_bad_input_to_invert_is_one_sentence(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.invert(**({"images": np.zeros((28, 28, 1), np.uint8), "conditions": 1} | arguments))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        Pipeline.from_workdir(tmp_path)


@pytest.fixture(scope="module")
def base():
    return random_pipe("configs/sdxl.py:tiny")


@pytest.mark.slow
def test_a_refiner_takes_over_from_a_base_model(base):
    refiner = random_pipe("configs/sdxl_refiner.py:tiny")
    prompts = ["a red fox", "a blue house"]
    latents = base(prompts, denoising_end=0.5, output="latents", num_steps=4, batch_size=1)
    assert latents.shape == (2, 16, 16, 4) and latents.dtype == np.float32
    assert latents.std() > 0.5  # still noisy
    options = dict(denoising_start=0.5, latents=latents, num_steps=4, batch_size=1)
    images = refiner(prompts, **options)
    assert images.shape == (2, 32, 32, 3) and images.std() > 5
    negative = {"caption": "blurry", "aesthetic_score": 2.5}
    other = refiner(prompts, negative=negative, **options)
    assert np.abs(images.astype(int) - other).max() > 0


@pytest.mark.slow
def test_the_two_halves_of_one_model_make_the_whole(base):
    whole = base("a red fox", num_steps=4, n=1)
    half = base("a red fox", num_steps=4, n=1, denoising_end=0.5, output="latents")
    rest = base("a red fox", num_steps=4, latents=half, denoising_start=0.5)
    assert np.abs(whole.astype(int) - rest).max() <= 1


@pytest.mark.slow
def test_latents_of_an_image_are_inverted_on_noise_levels(base):
    """With Euler's steps; what is drawn again are the latents of the image.

    Random weights predict noise that jumps where x moves a little, which no solver can follow; the
    last layer is weakened until it does not.
    """
    weaken = lambda path, leaf: 0.003 * leaf if "'out_2'" in jax.tree_util.keystr(path) else leaf
    params = jax.tree_util.tree_map_with_path(weaken, base.params)
    assert not all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(base.params)))
    smooth = base._replace(params=params)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    options = dict(num_steps=4, guidance_scale=1.0)
    x = smooth.invert(image, "a red fox", iterations=12, **options)
    drawn = smooth("a red fox", latents=x, output="latents", **options)
    network, pixels = base.experiment.network, image[None].astype(np.float32) / 127.5 - 1.0
    want = network.encode_mode(base.frozen, jnp.asarray(pixels))
    np.testing.assert_allclose(drawn, want, atol=2e-3 * float(np.abs(want).max()))
    assert np.abs(x - want).max() > 5e-3


@pytest.mark.slow
def test_a_weak_redraw_stays_near_the_image_and_a_mask_keeps_it(base):
    image = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (1, 32, 3))
    weak = base("a red fox", image=image, strength=0.4, num_steps=4)
    strong = base("a red fox", image=image, strength=1.0, num_steps=4)
    assert weak.shape == (1, 32, 32, 3) and np.abs(weak.astype(int) - strong).max() > 0
    mask = np.zeros((32, 32, 1), np.float32)
    mask[:16] = 1.0
    kept = base("a red fox", image=image, mask=mask, num_steps=4)
    np.testing.assert_array_equal(kept[0, :16], image[:16])


@pytest.mark.slow
def test_prompts_negatives_and_sizes_change_the_image(base):
    options = dict(num_steps=4, seed=1)
    fox = base("a red fox", **options).astype(int)
    assert np.abs(fox - base("a blue house", **options)).max() > 0
    assert np.abs(fox - base("a red fox", negative="a blue house", **options)).max() > 0
    small = base({"caption": "a red fox", "original_size": (8, 8)}, **options)
    assert np.abs(fox - small).max() > 0
    assert base("a red fox", height=48, width=16, **options).shape == (1, 48, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(denoising_start=0.5), "denoising_start = 0.5 needs latents"),
        (
            dict(latents=np.zeros((1, 16, 4))),
            r"latents has shape \(1, 16, 4\); it should be \(1, 16",
        ),
        (
            dict(latents=np.zeros((1, 8, 8, 4)), denoising_start=0.5),
            r"latents has shape \(1, 8, 8, 4\); it should be \(1, 16, 16, 4\)",
        ),
        (dict(denoising_start=0.9, denoising_end=0.1), "denoising_start = 0.9, denoising_end = 0"),
        (dict(height=30), "height = 30, width = 32 should be multiples of 4 pixels"),
        (dict(negative=["a", "b"]), "2 negative conditions for 1 image; give 1"),
        (dict(image=np.zeros((32, 32, 4), np.uint8), strength=0.5), r"image has shape \(32, 32, 4"),
        (dict(strength=1.5, image=np.zeros((32, 32, 3), np.uint8)), r"strength = 1\.5 should lie"),
        (
            dict(image=np.zeros((32, 32, 3), np.uint8), mask=np.full((32, 32, 1), 255.0)),
            r"mask has values from 255\.0 to 255\.0; they should lie in \[0, 1\]",
        ),
    ],
)
def test_bad_requests_to_a_text_model_are_one_sentence(base, arguments, message):
    with pytest.raises(ValueError, match=message):
        base("a red fox", **({"num_steps": 4} | arguments))


def test_a_call_says_how_far_it_is_and_is_stopped(pipe):
    seen = []
    watched = pipe([1, 2, 3], num_steps=4, batch_size=2, on_step=lambda *at: seen.append(at))
    # Two rounds of four steps.
    assert seen == [(step, 8) for step in range(8)]
    np.testing.assert_array_equal(watched, pipe([1, 2, 3], num_steps=4, batch_size=2))
    seen.clear()
    image = np.full((28, 28, 1), 200, np.uint8)
    pipe([1], num_steps=4, image=image, strength=0.6, on_step=lambda *at: seen.append(at))
    # Of the 5 noise levels 3 are kept, so the last 2 steps are taken.
    assert seen == [(0, 2), (1, 2)]
    seen.clear()

    def two_steps(done, total):
        seen.append(done)
        return done < 2

    with pytest.raises(Stopped, match="on_step stopped the call"):
        pipe([1], num_steps=4, on_step=two_steps)
    assert seen[-1] >= 2 and pipe([1], num_steps=4).shape == (1, 28, 28, 1)
