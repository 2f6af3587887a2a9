"""A model as other programs load it: its layout, the tensors beside the weights, its scheduler."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.tiny_videos import tiny
from support.trees import drawn

from diffusion_jax.convert.weights.claims import read_claims
from diffusion_jax.convert.weights.diffusers_video import fold_quant_conv
from diffusion_jax.convert.weights.places import export_checkpoint
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.claims import overrides_of
from diffusion_jax.experiment.files.export import export_diffusers, export_single_file
from diffusion_jax.experiment.files.weights import load_frozen, load_released
from diffusion_jax.experiment.task import Training


def model(name):
    path = f"configs/{name}.py:tiny"
    found = trained(path)
    frozen = {**found.frozen, "scale_factor": jnp.float32(0.13)}
    return built(path), found._replace(frozen=frozen, ema=None)


def read(path, name):
    return np.asarray(open_weights(path).tensors[name].load())


@pytest.mark.parametrize(
    ("name", "layout", "prefixes"),
    [
        ("sd15", "sd1", ["cond_stage_model.transformer."]),
        ("sd21", "sd2", ["cond_stage_model.model."]),
        ("sdxl", "sdxl", ["conditioner.embedders.0.transf", "conditioner.embedders.1.model."]),
        ("sdxl_refiner", "sdxl_refiner", ["conditioner.embedders.0.model."]),
    ],
)
def test_the_text_encoders_decide_the_layout(tmp_path, name, layout, prefixes):
    experiment, weights = model(name)
    path = tmp_path / "x.safetensors"
    assert experiment.task.export_file(weights, path) == layout
    names = open_weights(path).tensors.keys()
    for prefix in [*prefixes, "model.diffusion_model.", "first_stage_model."]:
        assert any(own.startswith(prefix) for own in names), prefix
    texts = {own.split(".")[0] for own in names} - {"model", "first_stage_model", "denoiser"}
    schedule = experiment.drawing.noise.schedule
    if layout in ("sd1", "sd2"):
        # Ho et al. 2020: what the originals keep of their schedule, by these names.
        alphas = np.cumprod(1.0 - read(path, "betas").astype(np.float64))
        np.testing.assert_allclose(read(path, "alphas_cumprod"), alphas, rtol=1e-5)
        rest = np.sqrt(1 / alphas - 1)
        np.testing.assert_allclose(read(path, "sqrt_recipm1_alphas_cumprod"), rest, rtol=1e-4)
        assert "denoiser.sigmas" not in names and "cond_stage_model" in texts
    else:
        sigmas = np.sqrt(1 / np.cumprod(1.0 - np.asarray(schedule.betas, np.float64)) - 1)
        np.testing.assert_allclose(read(path, "denoiser.sigmas"), sigmas, rtol=1e-4)
        assert "betas" not in names and texts == {"conditioner"}


def test_another_set_of_text_encoders_has_no_layout(tmp_path):
    experiment, weights = model("sdxl")
    network = experiment.network
    assert [name for name in network.embedders if "clip" in name] == ["clip", "open_clip"]
    network = network._replace(embedders=dict(reversed(network.embedders.items())))
    noise, path = experiment.drawing.noise, tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"\['open_clip', 'clip'\] of this model; the layouts ha"):
        export_single_file(network, noise, weights, path)
    assert not path.exists()


def test_averages_stand_beside_raw_weights_and_a_trained_encoder_is_the_one_written(tmp_path):
    experiment, weights = model("sdxl")
    path = tmp_path / "x.safetensors"
    ema = drawn(weights.params, 3)
    own = drawn(weights.frozen["conditioner"]["clip"], 4)
    params = {**weights.params, "conditioner": {**weights.params["conditioner"], "clip": own}}
    experiment.task.export_file(weights._replace(params=params, ema=ema), path, dtype=np.float16)
    raw = read(path, "model.diffusion_model.out.2.bias")
    averaged = read(path, "model_ema.diffusion_modelout2bias")
    np.testing.assert_array_equal(raw, np.float16(params["network"]["out_2"]["bias"]))
    np.testing.assert_allclose(averaged, ema["network"]["out_2"]["bias"], rtol=1e-3)
    norm = read(path, "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias")
    np.testing.assert_array_equal(norm, np.float16(own["final_layer_norm"]["bias"]))


@pytest.mark.parametrize(("name", "prediction"), [("sd15", "epsilon"), ("sd21", "v_prediction")])
def test_a_folder_says_how_the_model_was_trained(tmp_path, name, prediction):
    experiment, weights = model(name)
    experiment.task.export_folder(weights, tmp_path / "x")
    scheduler = json.loads((tmp_path / "x/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == prediction and scheduler["beta_start"] == 0.00085
    assert scheduler["num_train_timesteps"] == 1000 and scheduler["beta_end"] == 0.012
    unet = json.loads((tmp_path / "x/unet/config.json").read_text())
    height, _, channels = experiment.network.image_shape
    assert (unet["sample_size"], unet["in_channels"]) == (height, channels)
    vae = json.loads((tmp_path / "x/vae/config.json").read_text())
    assert vae["scaling_factor"] == pytest.approx(0.13)
    text = json.loads((tmp_path / "x/text_encoder/config.json").read_text())
    assert text["eos_token_id"] == text["vocab_size"] - 1  # not the largest token of a prompt
    (embedder,) = experiment.network.embedders.values()
    left_out = 1 if name == "sd21" else 0  # diffusers ends one layer earlier
    assert text["num_hidden_layers"] == embedder.module.tower.num_layers - left_out


V = "--config.schedule.parameterization=v"
ZERO = "--config.schedule.rescale_zero_snr=True"
EDM = [
    "--config.denoiser.name=continuous", "--config.denoiser.scaling.name=v_edm",
    "--config.discretization.name=edm", "--config.discretization.sigma_max=120.0",
    "--config.sigma_sampling.name=lognormal",
]  # fmt: skip

FLOW = [
    "--config.denoiser.name=continuous", "--config.denoiser.scaling.name=flow",
    "--config.discretization.name=flow", "--config.sigma_sampling.name=logit_normal",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "names", "word"),
    [
        ([], set(), "epsilon"),
        ([V], {"v_pred"}, "v"),
        ([V, ZERO], {"v_pred", "ztsnr"}, "v"),
        (EDM, {"edm_vpred.sigma_min", "edm_vpred.sigma_max"}, "v"),
        (FLOW, set(), "flow"),
    ],
)
def test_what_is_written_says_what_the_model_is(tmp_path, overrides, names, word):
    """Both forms are read as a model that the plain config contradicts, and that its own fits."""
    _, weights = model("sdxl")
    experiment, plain = built("configs/sdxl.py:tiny", *overrides), built("configs/sdxl.py:tiny")
    path = tmp_path / "x.safetensors"
    experiment.task.export_file(weights, path)
    found = open_weights(path)
    marks = {name for name in found.tensors if "pred" in name or name == "ztsnr"}
    assert marks == names and found.metadata["modelspec.prediction_type"] == word
    experiment.task.export_folder(weights, tmp_path / "x")
    scaled = built("configs/sdxl.py:tiny", "--config.first_stage.scale_factor=0.13", *overrides)
    for task, target in ((experiment.task, path), (scaled.task, tmp_path / "x")):
        assert task.contradictions(target) == []
    advice = overrides_of(plain.task.contradictions(path))
    trained = {EDM[-1], FLOW[-1], *EDM[3:4]}
    assert set(overrides) <= {*advice, *trained} and bool(advice) == bool(overrides)


def test_any_table_of_noise_levels_is_written_for_diffusers(tmp_path):
    experiment, weights = model("sd15")
    betas = experiment.drawing.noise.schedule.betas[::10]
    given = "--config.schedule.given_betas=" + repr(tuple(float(beta) for beta in betas))
    own = built("configs/sd15.py:tiny", given)
    own.task.export_folder(weights, tmp_path / "x")
    scheduler = json.loads((tmp_path / "x/scheduler/scheduler_config.json").read_text())
    np.testing.assert_allclose(scheduler["trained_betas"], betas, rtol=1e-3)
    assert scheduler["num_train_timesteps"] == 100 and "beta_start" not in scheduler
    levels = ("--config.denoiser.name=discrete", "--config.denoiser.quantize_c_noise=False")
    other = built("configs/sdxl.py:tiny", *levels)
    with pytest.raises(ConfigError, match=r"config\.denoiser has no counterpart among the sched"):
        other.task.export_folder(model("sdxl")[1], tmp_path / "y")


def shapes_of(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def no_random():
    raise AssertionError("nothing here is to be drawn")


def read_back(network, trained, path):
    params, _, absent = load_released(network, shapes_of(trained.params), {}, path, Training(1, 1))
    assert absent == []
    frozen = {name: trained.frozen[name] for name in ("conditioner", "first_stage")}
    return params, load_frozen(network, shapes_of(frozen), no_random, path)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


BLOCK = "model.diffusion_model.input_blocks.1.1"
VIEWS = {
    "conditioner.embedders.4.encoder.encoder.mid.block_1.norm1.weight",
    "conditioner.embedders.5.encoder.encoder.conv_in.weight",
    "first_stage_model.decoder.conv_out.weight",
    f"{BLOCK}.time_mix_blocks.0.attn1.to_q.weight",
}
ONE_VIEW = {
    "first_stage_model.decoder.conv_out.time_mix_conv.weight",
    "model.diffusion_model.input_blocks.1.0.time_mixer.mix_factor",
}


@pytest.mark.parametrize(
    ("model", "number", "some"),
    [
        ("svd", 3, ONE_VIEW),
        ("sv3d_u", 1, ONE_VIEW),
        pytest.param("sv4d", 1, VIEWS, marks=pytest.mark.slow),
        pytest.param("sv4d2", 1, VIEWS | {f"{BLOCK}.time_mixer_motion.mix_factor"},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_video_model_is_one_file_that_is_read_back_bit_for_bit(model, number, some, tmp_path):
    network, noise, trained = tiny(model)
    path = tmp_path / "x.safetensors"
    layout = {"sv3d_u": "sv3d", "sv4d2": "sv4d"}
    found = export_single_file(network, noise, trained, path)
    assert found == (layout[model] if model in layout else model)
    names = open_weights(path).tensors.keys()
    assert names > some | {
        "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0.attn.in_proj_weight",
        f"conditioner.embedders.{number}.encoder.encoder.mid.block_1.norm1.weight",
        f"conditioner.embedders.{number}.encoder.quant_conv.weight",
    }
    params, frozen = read_back(network, trained, path)
    same(params, trained.params)
    same(frozen["conditioner"], trained.frozen["conditioner"])
    same(frozen["first_stage"], trained.frozen["first_stage"])


@pytest.mark.slow
def test_the_decoder_beside_an_encoder_of_frames_is_not_needed(tmp_path):
    """Released files have the whole autoencoder in the conditioner."""
    network, _, trained = tiny()
    conditioner = trained.frozen["conditioner"]
    whole = network.embedders["frame"].module.autoencoder
    shapes = jax.eval_shape(whole.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    frames = drawn(shapes, 5) | conditioner["frame"]
    components = {
        "network": trained.params["network"],
        "first_stage": trained.frozen["first_stage"],
        "conditioner": {"image": conditioner["clip"], "frames": frames},
    }
    export_checkpoint(tmp_path / "x.safetensors", components, "svd")
    _, frozen = read_back(network, trained, tmp_path / "x.safetensors")
    same(frozen["conditioner"], conditioner)
    same(frozen["first_stage"], trained.frozen["first_stage"])


@pytest.mark.slow
def test_a_video_model_is_a_folder_of_diffusers(tmp_path):
    """Its autoencoder encodes the conditioning frame; what is denoised has the same encoder."""
    network, noise, trained = tiny()
    export_diffusers(network, noise, trained, tmp_path / "x")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    assert index["_class_name"] == "StableVideoDiffusionPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKLTemporalDecoder"]
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    unet = json.loads((tmp_path / "x/unet/config.json").read_text())
    assert (unet["in_channels"], unet["out_channels"]) == (8, 4)
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    claims = read_claims(tmp_path / "x")
    assert (claims.prediction, claims.sigma_min, claims.sigma_max) == ("v_edm", 0.002, 700.0)
    params, frozen = read_back(network, trained, tmp_path / "x")
    same(params, trained.params)
    same(frozen["conditioner"], trained.frozen["conditioner"])
    stage = trained.frozen["first_stage"]
    same(frozen["first_stage"]["decoder"], stage["decoder"])
    frames = trained.frozen["conditioner"]["frame"]
    same(frozen["first_stage"], fold_quant_conv({**frames, "decoder": stage["decoder"]}))
