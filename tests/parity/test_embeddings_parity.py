"""Vectors of new tokens: diffusers reads our files and its text encoder gives the same states."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax import Pipeline
from diffusion_jax.convert.weights.diffusers_folder import save_diffusers, text_config
from diffusion_jax.convert.weights.diffusers_pipeline import tokenizer_files
from diffusion_jax.convert.weights.embeddings import Embedding, read_embedding, write_embedding
from diffusion_jax.experiment.network.inversion import with_embedding
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.text import tokenizers_of
from diffusion_jax.models.conditioning.conditioner import init_embedders
from diffusion_jax.models.conditioning.embedders import clip_text

pytestmark = pytest.mark.parity

PROMPTS = ["a photo of <cat-toy> on the moon", "two <cat-toy>, one dog", "no new word"]
SIZES = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}


def package(name):
    """Import a package of the parity environment."""
    return pytest.importorskip(name)


@pytest.fixture(scope="module")
def model():
    """A network with a small text encoder of the whole vocabulary, and its random parameters."""
    embedders = {"text": clip_text(layer="last", **SIZES)}
    network = Network(None, embedders, "crossattn", (8, 8, 4), tokenize=tokenizers_of(embedders))
    batch = {e.input_key: e.example(1, (8, 8, 4)) for e in embedders.values()}
    held = init_embedders(embedders, batch, jax.random.key(0), trainable=False)
    rng = np.random.RandomState(0)
    held = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), "f4"), held)
    return network, {"conditioner": held}


@pytest.fixture
def pipeline(model, tmp_path):
    """A pipeline of diffusers with the same text encoder and tokenizer."""
    diffusers, transformers = package("diffusers"), package("transformers")
    network, frozen = model
    own = frozen["conditioner"]["text"]
    config = text_config(own, num_heads=2, hidden_act="quick_gelu")
    save_diffusers(tmp_path / "sd", {"conditioner": {"text": own}}, {"text": config})
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "sd/text_encoder").eval()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, text in tokenizer_files(next(iter(network.tokenize.values()))[1]).items():
        (folder / name).write_text(text)
    parts = {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder),
        "text_encoder": encoder,
        "scheduler": diffusers.DDIMScheduler(),
    }
    absent = ("unet", "vae", "safety_checker", "feature_extractor")
    return diffusers.StableDiffusionPipeline(
        **parts, **dict.fromkeys(absent), requires_safety_checker=False
    )


def ours(model, path, token=None):
    network, frozen = model
    network, params, frozen = with_embedding(
        network, {"conditioner": {}}, frozen, read_embedding(path, token)
    )
    batch = {key: jnp.asarray(t(PROMPTS)) for key, (_, t) in network.tokenize.items()}
    return np.asarray(network.embed(params, frozen, batch)["crossattn"])


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_our_file(model, pipeline, tmp_path, count):
    vectors = np.random.RandomState(1).standard_normal((count, 16)).astype(np.float32)
    path = tmp_path / "toy.safetensors"
    write_embedding(path, Embedding("<cat-toy>", {None: vectors}))
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name)
    theirs = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0].detach().numpy()
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours(model, path), theirs, atol=2e-5)


def test_each_encoder_of_a_file_for_sdxl(pipeline, tmp_path):
    torch_file = package("safetensors.torch")
    vectors = np.random.RandomState(2).standard_normal((2, 16)).astype(np.float32)
    path = tmp_path / "pair.safetensors"
    write_embedding(path, Embedding("<cat-toy>", {"clip_l": vectors, "clip_g": 2 * vectors}))
    tensors = torch_file.load_file(path)
    pipeline.load_textual_inversion(
        tensors["clip_g"], token="<cat-toy>", text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
    )  # fmt: skip
    table = pipeline.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(table[-2:], 2 * vectors, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_a_whole_pipeline_of_sdxl_draws_what_ours_draws(tmp_path, count):
    """Both encoders read their part of the file, the pooled text too."""
    torch, diffusers, load = package("torch"), package("diffusers"), package("safetensors.torch")
    path = "configs/sdxl.py:tiny"
    experiment, weights = built(path), trained(path)
    experiment.task.export_folder(weights, tmp_path / "folder")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    theirs.set_progress_bar_config(disable=True)
    file, rng = tmp_path / "toy.safetensors", np.random.RandomState(4)
    widths = {"clip_l": theirs.text_encoder, "clip_g": theirs.text_encoder_2}
    vectors = {
        name: rng.standard_normal((count, encoder.config.hidden_size)).astype(np.float32)
        for name, encoder in widths.items()
    }
    write_embedding(file, Embedding("<cat-toy>", vectors))
    held = load.load_file(file)
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        theirs.load_textual_inversion(
            held[name], token="<cat-toy>", text_encoder=getattr(theirs, f"text_encoder{part}"),
            tokenizer=getattr(theirs, f"tokenizer{part}"),
        )  # fmt: skip
    network = experiment.network
    noise = np.random.default_rng(0).standard_normal((3, *network.image_shape)).astype(np.float32)
    theirs.scheduler.set_timesteps(4)
    sigma = float(theirs.scheduler.init_noise_sigma)
    # diffusers begins at sigma, sgm and this program at sqrt(1 + sigma^2)
    begun = np.moveaxis(noise, -1, 1) * np.float32(np.sqrt(1.0 + sigma**2) / sigma)
    height, width, _ = experiment.data.image_shape
    found = theirs(
        PROMPTS, latents=torch.from_numpy(begun.copy()), num_inference_steps=4, guidance_scale=5.0,
        height=height, width=width, output_type="np",
    ).images  # fmt: skip
    plain = Pipeline(experiment, weights.params, weights.frozen)
    options = dict(noise=noise, num_steps=4, guidance_scale=5.0)
    drawn = plain.with_embedding(file, "<cat-toy>")(PROMPTS, **options) / 255.0
    assert np.abs(drawn - found).max() < 2.5 / 255.0
    without = plain(PROMPTS, **options) / 255.0
    assert np.abs(without - found)[:2].max() > 5.0 / 255.0
    assert np.abs(without - found)[2].max() < 2.5 / 255.0  # where the word does not stand


def test_we_read_what_web_interfaces_save(model, pipeline, tmp_path):
    torch = package("torch")
    vectors = torch.from_numpy(np.random.RandomState(3).standard_normal((2, 16)).astype(np.float32))
    path = tmp_path / "toy.pt"
    saved = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "<cat-toy>"}
    torch.save(saved, path)
    pipeline.load_textual_inversion(str(tmp_path), weight_name=path.name, token="<cat-toy>")
    theirs = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0].detach().numpy()
    np.testing.assert_allclose(ours(model, path, "<cat-toy>"), theirs, atol=2e-5)
