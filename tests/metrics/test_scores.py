"""Names of metrics, what they need, and numbers from two summaries."""

import numpy as np
import pytest

from diffusion_jax.metrics import distances, neighbours
from diffusion_jax.metrics.scores import (
    MANIFOLD,
    METRICS,
    check_count,
    clip_scores,
    compute_scores,
    find_metrics,
    score_name,
)
from diffusion_jax.metrics.summaries import summary

RANDOM = np.random.default_rng(0)


def summed(rows, features="net", key="k"):
    stream = summary(features, key)
    return stream.result(stream.update(stream.init(), rows, np.arange(len(rows))))


def test_a_distance_bears_the_name_of_its_features():
    names = {score_name(metric, "inception") for metric in ("frechet", "kernel", "mind")}
    assert names == {"fid", "kid", "mind"}
    assert score_name("frechet", "efficientnet_lite0") == "frechet_efficientnet_lite0"
    assert score_name("frechet", "i3d") == "fvd"
    assert score_name("gaussian_kernel", "clip_336") == "cmmd"
    assert score_name("gaussian_kernel", "clip_224") == "gaussian_kernel_clip_224"


def test_published_names_are_understood_where_the_features_are_theirs():
    assert find_metrics(("fid", "kernel", "mind", "fid"), "inception") == (
        "frechet", "kernel", "mind",
    )  # fmt: skip
    with pytest.raises(ValueError, match="'fid' should have features = 'inception'.*'frechet'"):
        find_metrics(("fid",), "dinov2")
    with pytest.raises(ValueError, match="metrics = 'fidd' is unknown; choose from frechet, .*fid"):
        find_metrics(("fidd",), "inception")
    with pytest.raises(ValueError, match="inception_score' should have features = 'inception'"):
        find_metrics(("inception_score",), "dinov2")
    with pytest.raises(ValueError, match="should name at least one"):
        find_metrics((), "dinov2")


@pytest.mark.parametrize(
    ("metric", "count", "message"),
    [
        (
            "frechet",
            8,
            "num_samples = 8 is too small for frechet with 8 features.*at least 9; mind",
        ),
        ("precision", 5, "should be at least 6"),
        ("kernel", 1, "should be at least 2"),
    ],
)
def test_too_few_samples_say_how_many(metric, count, message):
    with pytest.raises(ValueError, match=message):
        check_count((metric,), count, 8)
    check_count((metric,), count + 1, 8)


def test_scores_are_what_their_functions_say():
    x, y, training = (RANDOM.standard_normal((40, 3)).astype(np.float32) for _ in range(3))
    found = compute_scores(METRICS, summed(x), summed(y), summed(training))
    near = neighbours.copies(x, training)
    expected = {
        "frechet_net": distances.frechet(summed(x).moments, summed(y).moments),
        "kernel_net": distances.kernel(x, y).value,
        "mind_net": distances.mind(x, y),
        "gaussian_kernel_net": distances.gaussian_kernel(x, y).value,
        **{f"{n}_net": v for n, v in neighbours.manifold(x, y)._asdict().items()},
        "copied_net": near.copied,
        "nearest_ratio_net": near.ratio,
    }
    assert found == pytest.approx(expected)
    some = compute_scores(("recall",), summed(x), summed(y), summed(training))
    assert set(some) == {"recall_net", "copied_net", "nearest_ratio_net"}
    assert set(MANIFOLD) < set(METRICS)


def test_features_of_another_network_and_moments_alone_are_refused():
    x, y = summed(RANDOM.standard_normal((9, 3))), summed(RANDOM.standard_normal((9, 3)))
    for other in (summed(np.ones((9, 3)), "other"), summed(np.ones((9, 3)), key="other")):
        with pytest.raises(ValueError, match="should come from the same network"):
            compute_scores(("mind",), x, other, x)
    alone = y._replace(key=None, kept=None)
    assert "frechet_net" in compute_scores(("frechet",), x, alone, x)
    with pytest.raises(ValueError, match="a file of moments alone"):
        compute_scores(("mind",), x, alone, x)
    wide = alone._replace(moments=summed(np.ones((9, 4))).moments)
    with pytest.raises(ValueError, match="width 3 and the reference of width 4"):
        compute_scores(("frechet",), x, wide, x)


def test_clip_scores_are_cosines_without_the_negative_ones():
    images = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = np.array([[1.0, 0.0], [0.0, -1.0], [0.0, 9.0]])
    np.testing.assert_allclose(clip_scores(images, texts), [100.0, 0.0, 100 / np.sqrt(2)])
    with pytest.raises(ValueError, match="'clip_score' should have features = 'clip', not 'i3d'"):
        find_metrics(("clip_score",), "i3d")
