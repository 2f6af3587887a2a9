"""Tokenizers and the page of a folder for diffusers."""

import json

import pytest

from diffusion_jax.convert.weights.diffusers_pipeline import model_card, tokenizer_files
from diffusion_jax.data.tokenizer import clip_tokenizer


@pytest.mark.parametrize(("pad", "token"), [("eos", "<|endoftext|>"), ("zero", "!")])
def test_a_vocabulary_is_written_as_it_is_released(pad, token, tmp_path):
    """openai/clip-vit-large-patch14: 49,408 tokens, 48,894 merges, and the ids of some of them."""
    tokenizer = clip_tokenizer(max_length=40, pad=pad)
    files = tokenizer_files(tokenizer)
    vocabulary, merges = json.loads(files["vocab.json"]), files["merges.txt"].splitlines()
    assert len(vocabulary) == 49408 and list(vocabulary.values()) == list(range(49408))
    known = {"!": 0, "!</w>": 256, "in": 512, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known
    assert merges[:2] == ["#version: 0.2", "i n"] and len(merges) == 48895
    config = json.loads(files["tokenizer_config.json"])
    assert config["pad_token"] == token and config["model_max_length"] == 40
    assert json.loads(files["special_tokens_map.json"])["pad_token"] == token
    # The merges are a vocabulary that this program reads, too.
    (tmp_path / "merges.txt").write_text(files["merges.txt"])
    again = clip_tokenizer(str(tmp_path / "merges.txt"), max_length=40, pad=pad)
    texts = ["a red fox", "Größe & 'quotes'", ""]
    assert (again(texts) == tokenizer(texts)).all()


@pytest.mark.parametrize(
    ("pipeline", "scale", "task", "call"),
    [
        ("StableDiffusionXLPipeline", 5.0, "text-to-image", 'pipe("a red fox", num_inf'),
        ("StableDiffusionXLImg2ImgPipeline", 5.0, "text-to-image", "image=image, num_inf"),
        ("StableVideoDiffusionPipeline", None, "image-to-video", "pipe(image, num_inf"),
    ],
)
def test_the_page_says_how_to_draw(pipeline, scale, task, call):
    text = model_card("fox", pipeline, "foxes", num_steps=30, scale=scale, scheduler="Euler.")
    assert text.startswith("---\nlibrary_name: diffusers\n") and f"pipeline_tag: {task}" in text
    assert call in text and "on: foxes" in text and text.endswith("Euler.\n")
