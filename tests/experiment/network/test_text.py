"""Strings of a batch become tokens: one tokenizer for embedders that share it, null texts first."""

import numpy as np
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.text import tokenizer_of, tokenizers_of, with_null_tokens
from diffusion_jax.models.conditioning.embedders import class_label, clip_text, open_clip_text

SMALL = dict(width=8, num_layers=1, num_heads=1, mlp_dim=8)
CLIP = clip_text(**SMALL)
OPEN = open_clip_text(**SMALL, projection_dim=8)


def test_embedders_of_one_padding_share_their_tokens():
    both = tokenizers_of({"a": CLIP, "b": OPEN, "c": CLIP, "label": class_label(num_classes=2)})
    assert both.keys() == {CLIP.input_key, OPEN.input_key} and CLIP.input_key != OPEN.input_key
    source, tokenize = both[CLIP.input_key]
    assert source == "caption" and tokenize is tokenizer_of(CLIP.text)
    tokens = tokenize(["a red fox"])
    assert tokens.shape == (1, 77) and tokens.dtype == np.int32


def test_a_null_text_becomes_its_tokens():
    null = with_null_tokens(CLIP._replace(null_value=""), "config.x").null_value
    tokens = tokenizer_of(CLIP.text)([""])[0]
    np.testing.assert_array_equal(null, tokens)
    assert with_null_tokens(CLIP, "config.x") is CLIP
    label = class_label(num_classes=2)
    assert with_null_tokens(label, "config.x").null_value == 2
    with pytest.raises(ConfigError, match=r"config\.x\.null_value = 'none' is for text embedders"):
        with_null_tokens(label._replace(null_value="none"), "config.x")
