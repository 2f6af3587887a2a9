"""Metrics of a model: which samples are drawn, what they are compared with, and what is kept."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.metrics import distances
from diffusion_jax.metrics.extraction import Extractor
from diffusion_jax.runs.measuring import scoring
from diffusion_jax.runs.measuring.scoring import build_score, conditions, draw_samples, save_samples

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.uniform(-1, 1, (20, 28, 28, 1)).astype(np.float32)
OPTIONS = ScoringOptions(metrics=("mind", "recall"), num_samples=21, batch_size=8)


def thumbnails(params, images):
    """Features that tell images apart: means of 7 x 7 blocks, in [0, 1]."""
    b = images.shape[0]
    return images[..., 0].reshape(b, 4, 7, 4, 7).mean((2, 4)).reshape(b, 16) / 255 * params


class Sets(Data):
    """Data of 20 images; counts how often they were looked at."""

    passes = 0

    def source(self, role):
        return role

    def fingerprint(self, source):
        return {"digest": source}

    def eval_batches(self, source, *, batch_size):
        self.passes += 1
        size = -(-20 // batch_size) * batch_size
        rows = np.minimum(np.arange(size), 19)
        real = np.arange(size) < 20
        batches = [
            {
                "image": IMAGES[rows[i : i + batch_size]] * (1 if source == "train" else 0.5),
                "index": np.where(real, rows, -1)[i : i + batch_size],
                "weight": real[i : i + batch_size].astype(np.float32),
            }
            for i in range(0, size, batch_size)
        ]
        return Batches(lambda start: iter(batches), 20, len(batches), ((28, 28),))

    def train_batches(self, source, *, batch_size, seed, finish):
        def iterate(start):
            for n in range(100):
                labels = np.arange(8 * n, 8 * n + 8, dtype=np.int32) % 10
                yield finish({"image": IMAGES[:8], "label": labels})

        return Batches(iterate, 20, 3, ((28, 28),))


@pytest.fixture
def make(monkeypatch):
    """make(devices) -> an experiment that draws what its parameters say, with easy features."""
    extractor = Extractor("net", "1:k", 16, jnp.float32(1.0), thumbnails)
    monkeypatch.setattr(scoring, "make_extractor", lambda name, weights: extractor)
    monkeypatch.setattr(scoring, "check_scoring", lambda options: None)
    calls = []

    def sample_fn(params, frozen, inputs, keys, *, num_steps, guidance_scale):
        calls.append((inputs["label"].tolist(), num_steps, guidance_scale))
        noise = jax.vmap(lambda key: jax.random.uniform(key, (28, 28, 1), minval=-1))(keys)
        return SimpleNamespace(x=noise * params)

    def experiment(devices=1):
        found = built("configs/mnist.py:tiny", devices=devices)
        drawing = found.task.drawing._replace(sample_fn=sample_fn)
        setting = found.setting._replace(data=Sets(*found.data))
        return found._replace(task=found.task._replace(drawing=drawing), setting=setting)

    return experiment, calls


def test_samples_are_the_same_however_they_are_drawn(make, tmp_path):
    """Not the batch size, the devices or the padding change a score; every call sees one noise."""
    experiment, calls = make
    found = []
    for devices, size in ((1, 8), (8, 8), (1, 21)):
        options = OPTIONS._replace(batch_size=size)
        score = build_score(experiment(devices), {}, options, tmp_path / str(devices))
        found += [score(jnp.float32(1.0)), score(jnp.float32(1.0))]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    assert set(found[0]) == {"mind_net", "recall_net", "copied_net", "nearest_ratio_net"}
    labels = [label for call in calls[:3] for label in call[0]]
    assert labels[:21] == [i % 10 for i in range(21)] and {call[1:] for call in calls} == {
        (None, None)
    }


def test_scores_are_against_the_data_and_better_samples_score_better(make, tmp_path):
    score = build_score(make[0](), {}, OPTIONS, tmp_path)
    good, bad = score(jnp.float32(1.0)), score(jnp.float32(0.1))
    assert good["mind_net"] < bad["mind_net"]
    images = []
    assert score(jnp.float32(1.0), images) == good
    pixels = np.concatenate(images)
    assert pixels.shape == (21, 28, 28, 1) and pixels.dtype == np.uint8
    drawn = thumbnails(1.0, pixels.astype(np.float32))
    data = thumbnails(1.0, np.rint((IMAGES + 1) * 127.5))
    assert good["mind_net"] == pytest.approx(distances.mind(drawn, data), rel=1e-4)


def test_statistics_are_computed_once_and_kept(make, tmp_path):
    for _ in range(2):
        experiment = make[0]()
        build_score(experiment, {}, OPTIONS._replace(split="test"), tmp_path)
        passes = experiment.data.passes
    assert passes == 0 and len(list(tmp_path.iterdir())) == 2
    path = next(tmp_path.glob("train_net_*.npz"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train_net_\w+\.npz is damaged"):
        build_score(make[0](), {}, OPTIONS, tmp_path)


def test_a_reference_of_moments_serves_frechet_alone(make, tmp_path):
    path = tmp_path / "edm.npz"
    np.savez(path, mu=np.full(16, 0.5), sigma=np.eye(16))
    options = OPTIONS._replace(metrics=("frechet",), reference=str(path))
    images = []
    found = build_score(make[0](), {}, options, tmp_path)(jnp.float32(1.0), images)
    assert set(found) == {"frechet_net", "copied_net", "nearest_ratio_net"}
    rows = thumbnails(1.0, np.concatenate(images).astype(np.float64))
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False))
    expected = np.sum((rows.mean(0) - 0.5) ** 2) + np.sum((1 - np.sqrt(values)) ** 2)
    assert found["frechet_net"] == pytest.approx(expected, rel=1e-4)


def test_too_few_samples_say_how_many(make, tmp_path):
    with pytest.raises(ValueError, match="num_samples = 5 is too small for recall.*at least 6"):
        build_score(make[0](), {}, OPTIONS._replace(num_samples=5), tmp_path)


def test_conditions_come_in_the_order_of_training(make):
    assert conditions(make[0](), 11, ("label",))["label"].tolist() == [*range(10), 0]
    assert conditions(make[0](), 11, ()) == {}
    with pytest.raises(ValueError, match="has no caption, which the metrics need"):
        conditions(make[0](), 11, ("caption",))


def test_a_padded_batch_numbers_its_padding(make):
    options = OPTIONS._replace(num_samples=5, batch_size=4)
    inputs = {"label": np.arange(5)}
    drawn = list(draw_samples(make[0](), jnp.float32(1.0), {}, inputs, options))
    assert [ids.tolist() for _, ids in drawn] == [[0, 1, 2, 3], [4, -1, -1, -1]]


def test_other_tools_read_the_samples(tmp_path):
    save_samples(tmp_path / "s.npz", [np.full((2, 4, 4, 1), 7, np.uint8)] * 2)
    with np.load(tmp_path / "s.npz") as held:
        assert held["arr_0"].shape == (4, 4, 4, 3) and held["arr_0"].dtype == np.uint8


def test_scores_of_samples_alone(make, tmp_path, monkeypatch):
    """Pairs are neighbours in number, and no pair holds padding; classes come from features."""
    monkeypatch.setattr(scoring, "load_lpips", lambda: {})
    monkeypatch.setattr(scoring, "lpips", lambda p, x, y: jnp.abs(x - y).mean((1, 2, 3)))
    classes = Extractor(
        "inception", "1:k", 16, jnp.float32(1.0), thumbnails,
        probabilities=lambda params, features: jnp.full((features.shape[0], 4), 0.25),
    )  # fmt: skip
    monkeypatch.setattr(scoring, "make_extractor", lambda name, weights: classes)
    options = OPTIONS._replace(metrics=("lpips_diversity", "inception_score"))
    images = []
    found = build_score(make[0](), {}, options, tmp_path)(jnp.float32(1.0), images)
    values = np.concatenate(images).astype(np.float64) / 127.5 - 1.0
    pairs = np.abs(values[0:20:2] - values[1:21:2]).mean((1, 2, 3))
    assert found["lpips_diversity"] == pytest.approx(pairs.mean(), rel=1e-5)
    assert found["inception_score"] == pytest.approx(1.0)
    assert set(found) == {
        "lpips_diversity", "inception_score", "copied_inception", "nearest_ratio_inception",
    }  # fmt: skip
