"""Whole checkpoints, in one file or in a folder of diffusers."""

import jax
import numpy as np
import pytest

from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.names import NAME_MAPS
from diffusion_jax.convert.weights.places import PLACES, export_checkpoint, slots_of
from diffusion_jax.convert.weights.reading import open_weights

SMALL = {"channel_mult": (1,), "attention_resolutions": (1,), "transformer_depth": 1}
SLOTS = {
    "sd1": ("text",),
    "sd2": ("text",),
    "sdxl": ("text", "text_2"),
    "sdxl_refiner": ("text_2",),
    "svd": ("image", "frames"),
    "sv3d": ("image", "frames"),
    "sv4d": ("image", "frames", "frames_2", "frames_3"),
}


@pytest.fixture(scope="module")
def trees(unet, vae, text, vision):
    """Shapes of everything that a checkpoint has a place for."""
    first_stage = vae(ch_mult=(1,), attn_resolutions=())
    slots = {"text": text, "text_2": text, "image": vision}
    slots |= dict.fromkeys(("frames", "frames_2", "frames_3"), first_stage)

    def make(places):
        return {
            "network": unet(**SMALL),
            "first_stage": first_stage,
            "conditioner": {name: slots[name] for name in SLOTS[places]},
        }

    return make


def read_back(shapes, path, places, options=None):
    """Read every network by its place in the file, and once more by its number in the file."""
    slots = slots_of(PLACES[places], shapes)
    found = {}
    for name, (slot, tree) in slots.items():
        kind = NAME_MAPS[slot.name_map].kind
        rules = (options or {}).get(name, {})
        found[name] = import_network(tree, path, kind, prefix=slot.place, **rules)
        every = {**PLACES[places].conditioner, "first_stage": PLACES[places].first_stage}
        same_kind = sorted(s.place for s in every.values() if NAME_MAPS[s.name_map].kind == kind)
        number = same_kind.index(slot.place) if kind != "unet" else 0
        again = import_network(tree, path, kind, number=number, **rules)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, found[name]))
    whole = {name: found.pop(name) for name in ("network", "first_stage") if name in found}
    return whole | ({"conditioner": found} if found else {})


@pytest.mark.parametrize("places", PLACES)
def test_whole_checkpoints_survive(places, trees, draw, same, tmp_path):
    """Also with buffers beside the weights."""
    shapes, path = trees(places), tmp_path / "x.safetensors"
    params = draw(shapes)
    export_checkpoint(path, params, places, extras={"betas": np.ones(3)})
    names = open_weights(path).tensors
    assert "betas" in names
    assert set(PLACES[places].conditioner) == set(SLOTS[places])
    assert same(read_back(shapes, path, places), params)


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


@pytest.mark.parametrize("places", EXAMPLES)
def test_names_are_those_of_released_checkpoints(places, trees, draw, tmp_path):
    path = tmp_path / "x.safetensors"
    export_checkpoint(path, draw(trees(places)), places, dtype=np.float16)
    tensors = open_weights(path).tensors
    common = ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_out.bias"]
    for name in EXAMPLES[places] + common:
        assert name in tensors and tensors[name].dtype == np.float16


def test_parts_can_be_read_alone_with_options(trees, draw, same, tmp_path):
    shapes, path = trees("sd1"), tmp_path / "x.safetensors"
    params = draw(shapes)
    export_checkpoint(path, params, "sd1", extras={"model.diffusion_model.extra": np.ones(1)})
    alone = {"first_stage": shapes["first_stage"]}
    assert same(read_back(alone, path, "sd1"), {"first_stage": params["first_stage"]})
    alone = {"conditioner": shapes["conditioner"]}
    assert same(read_back(alone, path, "sd1"), {"conditioner": params["conditioner"]})
    with pytest.raises(ValueError, match="1 unused: model.diffusion_model.extra"):
        read_back(shapes, path, "sd1")
    options = {"network": {"allow_unused": ["extra"]}}
    assert same(read_back(shapes, path, "sd1", options), params)


def test_averages_come_along(unet, draw, same, tmp_path):
    shapes, path = {"network": unet()}, tmp_path / "x.safetensors"
    params = draw(shapes)
    average = {name: leaf for name, leaf in draw({"shift": shapes})["shift"]["network"].items()}
    average["out_2"] = {name: leaf + 1 for name, leaf in average["out_2"].items()}
    export_checkpoint(path, params, "sd1", ema=average)
    options = {"network": {"ema": True}}
    read = read_back(shapes, path, "sd1", options)
    assert same(read, {"network": average}) and not same(read, params)
    assert same(read_back(shapes, path, "sd1"), params)


def test_what_has_no_place_is_told(trees, draw, tmp_path):
    path = tmp_path / "x.safetensors"
    params = draw(trees("sdxl"))
    with pytest.raises(
        ValueError, match="'text_2' has no place.*it has network, first_stage, text"
    ):
        export_checkpoint(path, params, "sd1")
    with pytest.raises(ValueError, match="places = 'sd3' is unknown; choose from sd1, sd2"):
        export_checkpoint(path, params, "sd3")
    export_checkpoint(path, {"network": params["network"]}, "sdxl")
    for prefix in (None, "model.diffusion_model."):
        with pytest.raises(ValueError, match="holds no vae, but a unet under 'model.diffusion_mod"):
            import_network(params["first_stage"], path, "vae", prefix=prefix)
    with pytest.raises(ValueError, match="holds 0 networks of the kind 'clip text', and number 2"):
        import_network(params["conditioner"]["text"], path, "clip text", number=1)
