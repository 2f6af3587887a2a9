"""New tokens: what is trained, how it begins, where it enters, and what files hold of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built
from support.trees import drawn

from diffusion_jax.convert.weights.embeddings import Embedding, read_embedding
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.options import NewTokenOptions
from diffusion_jax.experiment.network.inversion import bind_tokens, with_embedding
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.conditioning.clip import ADDED

CONFIG = "configs/sdxl.py:tiny"
TOY = ("train.ckpt_path=x", "inversion.toy.init='red fox'", "inversion.toy.vectors=3")


def build(*overrides):
    return built(CONFIG, *(f"--config.{override}" for override in overrides))


@pytest.fixture(scope="module")
def model():
    """An experiment with one new token, its first parameters, and what is frozen."""
    experiment = build(*TOY)
    frozen = drawn(experiment.abstract_frozen(), 1) | experiment.frozen_constants()
    params = drawn(experiment.abstract_state().params, 2)
    return experiment, experiment.task.first_params(params, frozen), frozen


def tokens_of(experiment, text):
    batch = experiment.network.with_inputs(
        {"caption": [text], "image": np.zeros((1, 32, 32, 3), np.float32)}
    )
    return {name: jnp.asarray(rows) for name, rows in batch.items() if name != "caption"}


def test_only_the_vectors_are_trained_and_they_begin_as_copies(model):
    experiment, params, frozen = model
    names = jax.tree.map(jnp.shape, experiment.abstract_state().params)
    width = names["embeddings"]["clip"]["toy"][1]
    assert names == {"embeddings": {"clip": {"toy": (3, width)}, "open_clip": {"toy": (3, width)}}}
    tokenize = next(iter(experiment.network.tokenize.values()))[1].plain()
    red, fox = tokenize(["red fox"])[0][1:3]
    table = frozen["conditioner"]["clip"]["embeddings"]["token_embedding"]["embedding"]
    wanted = np.asarray(table)[[red, fox, red]]
    np.testing.assert_array_equal(params["embeddings"]["clip"]["toy"], wanted)


@pytest.mark.slow
def test_a_prompt_with_the_token_reads_the_vectors(model):
    """Vectors copied from some words give the same states as these words."""
    experiment, params, frozen = model
    network, drawing = experiment.network, experiment.drawing
    whole = drawing.whole(params, frozen)
    new, words = (
        network.embed(*whole, tokens_of(experiment, text))
        for text in ("a <toy> there", "a red fox red there")
    )
    for entry in ("crossattn", "vector"):
        np.testing.assert_allclose(new[entry], words[entry], rtol=1e-5, atol=1e-6)
    changed = jax.tree.map(lambda leaf: leaf + 1.0, params)
    other = network.embed(*drawing.whole(changed, frozen), tokens_of(experiment, "a <toy> there"))
    assert np.abs(np.asarray(other["crossattn"]) - new["crossattn"])[0, 2:].max() > 1e-3
    plain = network.embed(*drawing.whole(changed, frozen), tokens_of(experiment, "a red fox"))
    before = network.embed(*whole, tokens_of(experiment, "a red fox"))
    np.testing.assert_array_equal(plain["crossattn"], before["crossattn"])


def test_a_file_of_a_run_gives_another_model_the_same_token(model, tmp_path):
    experiment, params, frozen = model
    path = tmp_path / "toy.safetensors"
    trained = Trained(params, {}, frozen)
    assert experiment.task.layout(trained) == "embedding"
    assert experiment.task.export_file(trained, path) == "embedding"
    base = build("train.ckpt_path=x")
    own, held = experiment.drawing.whole(params, frozen)
    given = {n: leaf for n, leaf in frozen["conditioner"].items()}
    plain = {**held, "conditioner": given}
    network, _, found = with_embedding(
        base.network,
        {"network": own["network"], "conditioner": {}},
        plain,
        read_embedding(path, "<t>"),
    )
    assert found["conditioner"]["clip"]["embeddings"][ADDED].shape[0] == 3
    moved = base.with_network(network)
    ours = network.embed({"conditioner": {}}, found, tokens_of(moved, "a <t> there"))
    theirs = experiment.network.embed(own, held, tokens_of(experiment, "a <toy> there"))
    for entry in ("crossattn", "vector"):
        np.testing.assert_allclose(ours[entry], theirs[entry], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the token '<t>' exists already"):
        with_embedding(network, {"conditioner": {}}, found, read_embedding(path, "<t>"))
    wrong = Embedding("<u>", {None: np.zeros((1, 7), np.float32)})
    with pytest.raises(
        ValueError, match="'<u>' have 7 numbers; this model reads .* for clip_l and"
    ):
        with_embedding(network, {"conditioner": {}}, found, wrong)
    with pytest.raises(ConfigError, match="should end in .safetensors"):
        experiment.task.export_folder(trained, tmp_path / "folder")


def test_sections_have_defaults():
    assert bind_tokens({"toy": {"init": "toy"}}) == {"toy": NewTokenOptions("toy", 1, "<toy>")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inversion.toy.vectors=2"], r"config\.inversion\.toy\.init is missing"),
        (["inversion.toy.init=' '"], r"inversion\.toy\.init = ' ' should be words"),
        ([*TOY, "inversion.toy.vectors=0"], r"vectors = 0 should be at least 1"),
        ([*TOY, "inversion.toy.token=fox"], "inversion.toy: the token 'fox' exists already"),
        (
            [*TOY, "inversion.other.init=fox", "inversion.other.token='<toy>'"],
            r"inversion\.toy\.token = '<toy>' is the token of another section",
        ),
        (
            [*TOY, "adapters.rank=2"],
            r"config\.adapters cannot be trained together with config\.inversion: drop one",
        ),
        (
            [*TOY, "data.batches.crop=center", "latent_cache.folder=x"],
            r"config\.latent_cache\.text = True should be False with config\.inversion",
        ),
    ],
)
def test_what_does_not_fit_is_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


def test_a_model_without_text_encoders_has_no_tokens():
    with pytest.raises(ConfigError, match="is for models whose text encoders are clip_text"):
        built("configs/mnist.py:tiny", "--config.inversion.toy.init=toy")
