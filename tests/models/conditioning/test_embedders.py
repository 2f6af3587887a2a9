"""Factories of embedders: what their modules compute, and which keywords each one takes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.embedders import (
    EMBEDDERS,
    ClassEmbedder,
    ConcatTimestepEmbedder,
    TextOptions,
    TowerSizes,
    spread,
)
from diffusion_jax.models.conditioning.spatial_rescaler import LowResolution


def test_a_label_is_a_row_of_a_table_of_normal_numbers():
    module = ClassEmbedder(1000, 4)
    labels = jnp.array([3, 0, 999])
    found, variables = module.init_with_output(jax.random.key(0), labels)
    table = np.asarray(variables["params"]["embedding"]["embedding"])
    np.testing.assert_array_equal(found, table[[3, 0, 999]])
    assert abs(table.std() - 1) < 0.05 and abs(table.mean()) < 0.05
    tokens = ClassEmbedder(1000, 4, add_sequence_dim=True).apply(variables, labels)
    np.testing.assert_array_equal(tokens, found[:, None, :])


def test_numbers_are_waves_of_falling_frequency_side_by_side():
    numbers = np.array([[3.0, 512.0]])
    found = ConcatTimestepEmbedder(4).apply({}, jnp.float32(numbers))
    frequencies = 10_000.0 ** (-np.arange(2) / 2)
    angles = numbers[0][:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).reshape(1, 8)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_constant_image_has_no_details_to_lose():
    image = jnp.full((1, 8, 8, 2), 0.3)
    np.testing.assert_allclose(LowResolution(4).apply({}, image), image, rtol=1e-5)


def test_fields_of_records_become_keywords():
    @spread(options=TextOptions(max_length=9), sizes=TowerSizes())
    def make(*, own, options, sizes):
        seen.append((own, options, sizes))
        return EMBEDDERS["class_label"](num_classes=3)

    seen = []
    make(own=1, ucg_rate=0.5, width=8)
    assert seen == [(1, TextOptions(max_length=9, ucg_rate=0.5), TowerSizes(width=8))]
    parameters = inspect.signature(make).parameters
    assert parameters["max_length"].default == 9 and "options" not in parameters
    with pytest.raises(TypeError, match="depth"):
        make(own=1, depth=3)


TEXT = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
SMALL = {
    "class_embedding": {"num_classes": 3, "embed_dim": 4},
    "class_label": {"num_classes": 3},
    "clip_text": TEXT,
    "concat_image": {"input_key": "mask", "channels": 1},
    "encoded_frames": {"ch": 8, "num_groups": 4},
    "features": {"input_key": "x", "shape": (5,)},
    "image_latents": {"input_key": "edited"},
    "inpainting_mask": {},
    "low_resolution": {"factor": 2, "channels": 3},
    "numbers": {"input_key": "size"},
    "open_clip_image": TEXT | {"projection_dim": 8},
    "open_clip_text": TEXT,
    "spatial_rescaler": {"input_key": "map", "channels": 2},
    "transformer_text": {"width": 8, "num_layers": 1, "num_heads": 1, "head_dim": 8},
}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_every_factory_says_what_it_reads_and_whether_it_is_dropped(name):
    dropped = {} if name == "inpainting_mask" else {"ucg_rate": 0.25}  # its mask is always seen
    embedder = EMBEDDERS[name](**SMALL[name], **dropped)
    assert embedder.ucg_rate == (0.25 if dropped else 0.0) and embedder.input_key
    example = embedder.example(2, (16, 16, 3))
    assert example.shape[0] == 2 and (embedder.channels is None or example.ndim == 4)
    reads_text = name in ("clip_text", "open_clip_text", "transformer_text")
    assert (embedder.text is not None) == reads_text
    if reads_text:
        assert embedder.input_key == embedder.text.tokens_key and example.shape == (2, 77)


def test_pretrained_towers_are_frozen_and_tables_are_trained():
    trained = {name for name in EMBEDDERS if EMBEDDERS[name](**SMALL[name]).trainable}
    assert not {"clip_text", "open_clip_text", "open_clip_image", "encoded_frames"} & trained
    assert {"class_embedding", "transformer_text", "spatial_rescaler"} <= trained


def test_texts_end_as_their_tokenizers_end_them():
    clip, open_clip = (EMBEDDERS[name](**TEXT) for name in ("clip_text", "open_clip_text"))
    assert (clip.text.pad, open_clip.text.pad) == ("eos", "zero")
    shorter = EMBEDDERS["clip_text"](**TEXT, max_length=7, input_key="prompt", ucg_group="a")
    assert (shorter.shape, shorter.text.source, shorter.ucg_group) == ((7,), "prompt", "a")


def test_defaults_of_numbers_are_counted():
    assert EMBEDDERS["numbers"](input_key="size", default=[0, 1]).default == (0.0, 1.0)
    assert EMBEDDERS["numbers"](input_key="size", default="size").default == "size"
    with pytest.raises(ValueError, match=r"default = \(1\.0,\) of 'size' has 1 numbers; .* = 2"):
        EMBEDDERS["numbers"](input_key="size", default=[1])
