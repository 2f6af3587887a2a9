"""From two summaries to numbers: which metrics there are, their names, and what they need."""

from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax.metrics import distances
from diffusion_jax.metrics.neighbours import copies, manifold
from diffusion_jax.metrics.statistics import Kept, keep
from diffusion_jax.metrics.summaries import Summary

# Neighbours are looked for among so many records at most.
NEIGHBOURS = 10_000
MANIFOLD = ("precision", "recall", "density", "coverage")
METRICS = ("frechet", "kernel", "mind", "gaussian_kernel", *MANIFOLD)
# What is said of samples without data to compare with.
ALONE = ("inception_score", "lpips_diversity", "clip_score")
# A distance bears the name of a paper only with the features of that paper.
PUBLISHED = {
    ("frechet", "inception"): "fid",
    ("kernel", "inception"): "kid",
    ("mind", "inception"): "mind",
    ("frechet", "i3d"): "fvd",
    ("kernel", "i3d"): "kvd",
    ("gaussian_kernel", "clip_336"): "cmmd",
}


def score_name(metric: str, features: str) -> str:
    """Name a metric after its features: "fid" for Inception's, else "frechet_dinov2" and so on."""
    published = (metric, features) in PUBLISHED
    return PUBLISHED[metric, features] if published else f"{metric}_{features}"


def find_metrics(names: Sequence[str], features: str) -> tuple[str, ...]:
    """Look up metrics by their own or their published names, without repetition.

    Raises ValueError for an unknown name, and for a published one that needs other features.
    """
    found: dict[str, None] = {}
    for name in names:
        own = [m for (m, f), published in PUBLISHED.items() if published == name and f == features]
        needs = {f: m for (m, f), published in PUBLISHED.items() if published == name}
        if name in METRICS + ALONE or own:
            found[own[0] if own else name] = None
        elif needs:
            (network, metric), *_ = needs.items()
            raise ValueError(
                f"metrics = {name!r} should have features = {network!r}; with {features!r} ask for "
                f"{metric!r}"
            )
        else:
            known = dict.fromkeys((*METRICS, *ALONE, *PUBLISHED.values()))
            raise ValueError(f"metrics = {name!r} is unknown; choose from {', '.join(known)}")
    if not found:
        raise ValueError(f"metrics = {tuple(names)} should name at least one of {METRICS}")
    if "inception_score" in found and features != "inception":
        raise ValueError(
            f"metrics = 'inception_score' should have features = 'inception', not {features!r}"
        )
    if "clip_score" in found and not features.startswith("clip"):
        raise ValueError(f"metrics = 'clip_score' should have features = 'clip', not {features!r}")
    return tuple(found)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Compute 100 max(cos, 0) of embeddings of images [n d] and of their texts [n d] -> [n].

    Source: Hessel et al. 2021, "CLIPScore", with the factor 100 that is usual.
    """
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (images, texts))
    return 100.0 * np.maximum((x * y).sum(1), 0.0)


def check_count(metrics: Sequence[str], num_samples: int, width: int) -> None:
    """Raise ValueError when a metric needs more samples than there are.

    A covariance of no more samples than features is singular, and its distance says little.
    """
    least = {"frechet": width + 1, "inception_score": 10, **dict.fromkeys(MANIFOLD, 6)}
    for metric in metrics:
        needed = least[metric] if metric in least else 2
        if num_samples < needed:
            other = "; mind and kernel get by with fewer" if metric == "frechet" else ""
            raise ValueError(
                f"num_samples = {num_samples} is too small for {metric} with {width} features; it "
                f"should be at least {needed}{other}"
            )


def compute_scores(
    metrics: Sequence[str], samples: Summary, reference: Summary, training: Summary
) -> dict[str, float]:
    """Compute metrics by name, and how near the samples are to training data beside them.

    reference: what the samples should be like. training: what the model was trained on.
    copied: see neighbours.Copies; nearest_ratio is its `ratio`.
    Raises ValueError for too few samples, features of different networks, and a reference of
    moments alone for any metric but frechet.
    """
    features = samples.features
    for other in (reference, training):
        if other.features != features or other.key not in (samples.key, None):
            raise ValueError(
                f"the samples have features of {features} and the reference of {other.features} "
                "or of other weights; both should come from the same network"
            )
    distances.check_widths(samples.moments.mean, reference.moments.mean)
    check_count(metrics, samples.moments.count, len(samples.moments.mean))
    found: dict[str, float] = {}
    if "frechet" in metrics:
        found["frechet"] = distances.frechet(samples.moments, reference.moments)
    if set(metrics) & set(METRICS) - {"frechet"}:
        found |= _of_rows(metrics, _kept(samples), _kept(reference))
    near = copies(_kept(samples).rows, _kept(training).rows)
    named = {score_name(name, features): value for name, value in found.items() if name in metrics}
    return named | {f"copied_{features}": near.copied, f"nearest_ratio_{features}": near.ratio}


def _of_rows(metrics: Sequence[str], samples: Kept, reference: Kept) -> dict[str, float]:
    x, y = samples.rows, reference.rows
    make: dict[str, Callable[[], float]] = {
        "kernel": lambda: distances.kernel(x, y).value,
        "mind": lambda: distances.mind(x, y),
        "gaussian_kernel": lambda: distances.gaussian_kernel(x, y).value,
    }
    found = {metric: make[metric]() for metric in metrics if metric in make}
    if set(metrics) & set(MANIFOLD):
        found |= manifold(_few(samples), _few(reference))._asdict()
    return found


def _few(kept: Kept) -> np.ndarray:
    stream = keep(NEIGHBOURS)
    return stream.result(stream.update(stream.init(), kept.rows, kept.ids)).rows


def _kept(found: Summary) -> Kept:
    if found.kept is None:
        raise ValueError(
            "the reference is a file of moments alone, which only frechet (fid with Inception) "
            "compares with"
        )
    return found.kept
