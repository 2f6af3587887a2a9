"""Whole checkpoints, in one file or in a folder of diffusers."""

import numpy as np
import pytest

from diffusion_jax.convert.weights.places import LAYOUTS, export_checkpoint, import_checkpoint
from diffusion_jax.convert.weights.reading import open_weights

SMALL = {"channel_mult": (1,), "attention_resolutions": (1,), "transformer_depth": 1}
SLOTS = {
    "sd1": ("text",),
    "sd2": ("text",),
    "sdxl": ("text", "text_2"),
    "sdxl_refiner": ("text_2",),
    "svd": ("image", "frames"),
}


@pytest.fixture(scope="module")
def trees(unet, vae, text, vision):
    """Shapes of everything that a layout has a place for."""
    first_stage = vae(ch_mult=(1,), attn_resolutions=())
    slots = {"text": text, "text_2": text, "image": vision, "frames": first_stage}

    def make(layout):
        return {
            "network": unet(**SMALL),
            "first_stage": first_stage,
            "conditioner": {name: slots[name] for name in SLOTS[layout]},
        }

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_checkpoints_survive(layout, trees, draw, same, tmp_path):
    """Also without being told the layout, and with buffers beside the weights."""
    shapes, path = trees(layout), tmp_path / "x.safetensors"
    params = draw(shapes)
    export_checkpoint(path, params, layout, extras={"betas": np.ones(3)})
    names = open_weights(path).tensors
    assert "betas" in names
    slots = {**LAYOUTS[layout].conditioner}
    assert set(slots) == set(SLOTS[layout])
    for given in (layout, None):
        assert same(import_checkpoint(shapes, path, given), params)


EXAMPLES = {
    "sd1": ["cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"],
    "sd2": ["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.layer_norm1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.bias",
        "conditioner.embedders.1.model.text_projection",
    ],
    "sdxl_refiner": ["conditioner.embedders.0.model.transformer.resblocks.0.mlp.c_proj.bias"],
    "svd": [
        "conditioner.embedders.0.open_clip.model.visual.conv1.weight",
        "conditioner.embedders.3.encoder.encoder.conv_in.weight",
        "conditioner.embedders.3.encoder.quant_conv.weight",
    ],
}


@pytest.mark.parametrize("layout", EXAMPLES)
def test_names_are_those_of_released_checkpoints(layout, trees, draw, tmp_path):
    path = tmp_path / "x.safetensors"
    export_checkpoint(path, draw(trees(layout)), layout, dtype=np.float16)
    tensors = open_weights(path).tensors
    common = ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_out.bias"]
    for name in EXAMPLES[layout] + common:
        assert name in tensors and tensors[name].dtype == np.float16


def test_parts_can_be_read_alone_with_options(trees, draw, same, tmp_path):
    shapes, path = trees("sd1"), tmp_path / "x.safetensors"
    params = draw(shapes)
    export_checkpoint(path, params, "sd1", extras={"model.diffusion_model.extra": np.ones(1)})
    alone = {"first_stage": shapes["first_stage"]}
    assert same(import_checkpoint(alone, path), {"first_stage": params["first_stage"]})
    alone = {"conditioner": shapes["conditioner"]}
    assert same(import_checkpoint(alone, path), {"conditioner": params["conditioner"]})
    with pytest.raises(ValueError, match="1 unused: model.diffusion_model.extra"):
        import_checkpoint(shapes, path)
    options = {"network": {"allow_unused": ["extra"]}}
    assert same(import_checkpoint(shapes, path, options=options), params)


def test_averages_come_along(unet, draw, same, tmp_path):
    shapes, path = {"network": unet()}, tmp_path / "x.safetensors"
    params = draw(shapes)
    average = {name: leaf for name, leaf in draw({"shift": shapes})["shift"]["network"].items()}
    average["out_2"] = {name: leaf + 1 for name, leaf in average["out_2"].items()}
    export_checkpoint(path, params, "sd1", ema=average)
    options = {"network": {"ema": True}}
    read = import_checkpoint(shapes, path, "sd1", options=options)
    assert same(read, {"network": average}) and not same(read, params)
    assert same(import_checkpoint(shapes, path, "sd1"), params)


def test_what_has_no_place_is_told(trees, draw, tmp_path):
    path = tmp_path / "x.safetensors"
    params = draw(trees("sdxl"))
    with pytest.raises(
        ValueError, match="'text_2' has no place.*it has network, first_stage, text"
    ):
        export_checkpoint(path, params, "sd1")
    with pytest.raises(ValueError, match="layout 'sd3' is unknown; choose one of sd1, sd2"):
        export_checkpoint(path, params, "sd3")
    export_checkpoint(path, {"network": params["network"]}, "sdxl")
    with pytest.raises(ValueError, match="x.safetensors: this is no whole checkpoint"):
        import_checkpoint(trees("sdxl"), path)
    with pytest.raises(ValueError, match="missing: first_stage_model.decoder"):
        import_checkpoint(trees("sdxl"), path, "sdxl")
