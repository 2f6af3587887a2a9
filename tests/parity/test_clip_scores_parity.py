"""The CLIP score and the CMMD with the file of a whole CLIP, against transformers.

The file is one that transformers writes, of the released form but small and with random weights.
"""

import jax
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.tokenizer import clip_tokenizer
from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.models.conditioning import clip as towers
from diffusion_jax.models.conditioning.text_embedders import CLIP_MEAN, CLIP_STD
from diffusion_jax.models.features import clip
from diffusion_jax.runs.measuring.scoring import build_score, conditions

pytestmark = pytest.mark.parity
COUNT, SIDE, PATCH = 10, 336, 56
VISION = {"width": 64, "num_layers": 2, "num_heads": 2, "mlp_dim": 96, "projection_dim": 24}
TEXT = {"width": 48, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "projection_dim": 24}


@pytest.fixture(scope="module")
def model():
    """A whole CLIP with random weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    def sizes(chosen):
        return {
            "hidden_size": chosen["width"],
            "num_hidden_layers": chosen["num_layers"],
            "num_attention_heads": chosen["num_heads"],
            "intermediate_size": chosen["mlp_dim"],
        }

    torch.manual_seed(0)
    ends = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config={**sizes(TEXT), **ends},
        vision_config={**sizes(VISION), "image_size": SIDE, "patch_size": PATCH},
        projection_dim=24,
    )
    net = CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return net


@pytest.fixture
def small(monkeypatch):
    """Let the sizes above be those of a released tower."""
    monkeypatch.setitem(towers.VISION_SIZES, "small", VISION | {"patch_size": PATCH})
    monkeypatch.setitem(towers.TEXT_SIZES, "small", TEXT)
    monkeypatch.setitem(clip._TOWERS, VISION["width"], "small")


def projected(found):
    """The embeddings, which newer versions of transformers return among other things."""
    return found if hasattr(found, "shape") else found.pooler_output


def image_embeddings(model, images):
    """Embed uint8 images [n h w 3] as CLIP's processor shows them to it, unrounded."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    # With antialias=True the cubic is that of PIL.
    large = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
    with torch.no_grad():
        return projected(model.get_image_features(pixel_values=(large / 255 - mean) / std))


def text_embeddings(model, captions):
    import torch

    tokens = torch.from_numpy(np.asarray(clip_tokenizer()(captions))).long()
    with torch.no_grad():
        return projected(model.get_text_features(input_ids=tokens))


def test_samples_of_a_model_are_scored_as_torch_scores_them(model, small, tmp_path):
    import torch

    model.save_pretrained(tmp_path)  # model.safetensors, by the names of the released files
    options = ScoringOptions(
        metrics=("clip_score", "cmmd"),
        features="clip",
        weights=str(tmp_path / "model.safetensors"),
        num_samples=COUNT,
        num_steps=2,
    )
    experiment = built("configs/emoji.py:tiny", devices=2)
    params, frozen = experiment.init_state().params, experiment.random_frozen()
    images = []
    with jax.debug_key_reuse(False):
        found = build_score(experiment, frozen, options, tmp_path)(params, images)
        captions = conditions(experiment, COUNT, ("caption",))["caption"].tolist()
    drawn = image_embeddings(model, np.concatenate(images))
    texts = text_embeddings(model, captions)
    scores = 100 * torch.nn.functional.cosine_similarity(drawn, texts)
    assert len(set(captions)) > 5 and scores.max() > 1
    assert found["clip_score"] == pytest.approx(float(scores.clamp(min=0).mean()), rel=1e-4)

    source = experiment.data.source("train")
    (batch,) = experiment.data.eval_batches(source, batch_size=len(source)).iterate(0)
    data = image_embeddings(model, np.rint((np.asarray(batch["image"]) + 1) * 127.5))
    x, y = (torch.nn.functional.normalize(e.double()) for e in (drawn, data))
    chosen = np.random.default_rng(0)
    chosen.permutation(COUNT)
    y = y[chosen.permutation(len(y))[:COUNT]]  # as many as there are samples
    kernel = lambda a, b: torch.exp(-(torch.cdist(a, b) ** 2) / 200)  # noqa: E731
    same = sum((k.sum() - k.trace()) / (COUNT * (COUNT - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = 1000 * (same - 2 * kernel(x, y).mean())
    assert found["cmmd"] == pytest.approx(float(expected), rel=1e-3)
