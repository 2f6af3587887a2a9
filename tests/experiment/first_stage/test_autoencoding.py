"""A config of a first stage: it trains, its mistakes are told, and a latent model reads its run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built as build
from support.trees import drawn

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.files.weights import scale_by_std
from diffusion_jax.runs.weights import make_frozen
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import ema_params

ONE = jax.devices()[:1]
VAE = "configs/emoji_vae.py:tiny"
LDM = "configs/emoji_ldm.py:tiny"
VIDEO = "configs/svd_decoder.py:tiny"


@pytest.mark.slow
@pytest.mark.parametrize("path", [VAE, "configs/vq_f4.py:tiny"])
def test_one_program_trains_and_evaluates(path):
    built = build(path)
    state = built.check()
    assert set(state.params) == {"autoencoder", "loss", "discriminator"}
    assert set(ema_params(state.opt_state)) == {"autoencoder", "loss"}
    _, metrics = jax.eval_shape(
        built.train_step, state, built.abstract_batch(), built.abstract_frozen()
    )
    names = {"loss/total", "loss/nll", "loss/rec", "loss/g", "scalars/logvar", "scalars/d_weight"}
    names |= {"loss/disc", "logits/real", "logits/fake"}
    assert names <= set(metrics)
    assert ("kl_loss" if path == VAE else "loss/vq") in metrics


@pytest.mark.slow
def test_actnorm_waits_for_the_first_batch():
    config = load_config(VAE, ["--config.discriminator.use_actnorm=True"])
    built = make_experiment(config, devices=ONE)
    params = jax.jit(built.task.init)(jax.random.key(0)).params["discriminator"]
    assert not params["main_3"]["loc"].any() and np.all(params["main_3"]["scale"] == 1.0)
    images = jax.random.normal(jax.random.key(1), (4, *built.data.image_shape))
    prepared = built.task.reconstructing.networks.prepare(params, images)
    assert np.all(prepared["main_3"]["loc"] != 0.0)
    assert build(VAE).task.reconstructing.networks.prepare is None  # BatchNorm


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("conditioning", {}, r"config\.conditioning is for diffusion models"),
        ("regularizer", dict(name="kll"), r"config\.regularizer\.name = 'kll' is unknown; did you"),
        ("regularizer", dict(name="vq"), r"config\.model\.double_z = True should be False"),
        ("regularizer", dict(name="kl", beta=1.0), r"config\.regularizer\.beta = 1\.0 is not an"),
        ("discriminator", dict(name="patchgn"), r"config\.discriminator\.name = 'patchgn' is unk"),
        (
            "perceptual",
            dict(name="lpips", net="vgg"),
            r"config\.perceptual\.net = 'vgg' should be one of 'vgg16', 'alexnet'",
        ),
        ("loss", dict(name="autoencoder"), r"config\.loss\.disc_start is missing"),
        ("loss", dict(name="ddpm"), r"config\.loss\.name = 'ddpm' is unknown"),
        (
            "disc_optimizer",
            dict(name="adam", ema_decay=0.9),
            r"config\.disc_optimizer\.ema_decay = 0\.9 should be None",
        ),
        ("disc_optimizer", dict(name="adma"), r"config\.disc_optimizer\.name = 'adma' is unknown"),
    ],
)
def test_mistakes_are_told(section, value, message):
    config = load_config(VAE, [])
    with config.unlocked():
        config[section] = value
    with pytest.raises(ConfigError, match=message):
        make_experiment(config, devices=ONE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.accumulate=2", r"config\.train\.accumulate = 2 should be 1"),
        (
            "--config.train.gradient_dtype=bfloat16",
            r"gradient_dtype = .bfloat16. should be .float32.",
        ),
        ("--config.data.batches.image_size=31", r"image_size = \(31, 31\) should be a multiple"),
        ("--config.model.in_channels=1", r"config\.model\.in_channels = 1 .* should be 3"),
        ("--config.loss.disc_loss=hing", r"config\.loss\.disc_loss = 'hing' should be one of"),
        ("--config.train.trainable=_in", r"trainable = '_in' .*found in autoencoder/decoder/conv_"),
        ("--config.model.name=autoencoder_video", r"decodes clips of video; set .*num_frames"),
    ],
)
def test_wrong_values_are_told(override, message):
    with pytest.raises(ConfigError, match=message):
        build(VAE, override)


def test_sections_of_first_stages_are_refused_elsewhere():
    config = load_config(LDM, [])
    with config.unlocked():
        config.perceptual = dict(name="lpips")
    with pytest.raises(
        ConfigError, match=r"config\.perceptual is for the training of first stages"
    ):
        make_experiment(config, devices=ONE)
    with pytest.raises(ValueError, match="trains a first stage"):
        _ = build(VAE).network


def test_missing_weights_are_told_before_anything_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"perceptual\.weights = '.*none\.ckpt' does not"):
        build(VAE, f"--config.perceptual.weights={tmp_path}/none.ckpt").task.check_sources()
    with pytest.raises(FileNotFoundError, match=r"first_stage\.weights = '.*none' does not exist"):
        build(LDM, f"--config.first_stage.weights={tmp_path}/none").task.check_sources()
    with pytest.raises(ConfigError, match=r"config\.first_stage\.weights is not set"):
        build(LDM, "--config.first_stage.weights=None").task.check_sources()


@pytest.fixture(scope="module")
def first_stage_run(tmp_path_factory):
    """A run folder with a checkpoint of a first stage whose averages are not its parameters."""
    folder = tmp_path_factory.mktemp("vae")
    state = drawn(build(VAE).abstract_state())
    checkpoints = open_checkpoints(folder / "checkpoints")
    checkpoints.save(1, state, {})
    checkpoints.close()
    return folder, state


def test_a_latent_model_reads_the_averages_of_a_first_stages_run(first_stage_run):
    folder, state = first_stage_run
    frozen = make_frozen(build(LDM, f"--config.first_stage.weights={folder}"))
    expected = ema_params(state.opt_state)["autoencoder"]
    jax.tree.map(np.testing.assert_array_equal, frozen["first_stage"], expected)
    with pytest.raises(ValueError, match="differs from config.first_stage: .* parameters differ"):
        make_frozen(build(LDM, f"--config.first_stage.weights={folder}",
                          "--config.first_stage.ch=64"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq", "ema_vq"])
def test_a_latent_model_reads_the_codes_of_a_run(tmp_path, name):
    config = load_config("configs/vq_f4.py:tiny", [])
    with config.unlocked():
        config.regularizer = dict(name=name, num_codes=16)
    state = drawn(make_experiment(config, devices=ONE).abstract_state())
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    checkpoints.close()
    config = load_config(LDM, [])
    with config.unlocked():
        config.first_stage.update(dict(name="autoencoder_vq", num_codes=16, embed_dim=3))
        config.first_stage.update(dict(z_channels=3, ch=32, num_groups=32, attn_type="vanilla"))
        config.first_stage.weights = str(tmp_path)
        config.model.out_channels = 3
    frozen = make_frozen(make_experiment(config, devices=ONE))
    codes = frozen["first_stage"]["quantize"]["embedding"]
    if name == "vq":
        expected = ema_params(state.opt_state)["autoencoder"]["quantize"]["embedding"]
    else:
        expected = state.mutable["regularizer"]["codebook"]["embedding"]
    np.testing.assert_array_equal(codes, expected)


def test_the_scale_factor_makes_the_latents_of_a_batch_unit(first_stage_run):
    folder, _ = first_stage_run
    built = build(LDM, f"--config.first_stage.weights={folder}")
    frozen = make_frozen(built)
    assert float(frozen["scale_factor"]) == 1.0
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32),
        "caption": np.array(["a"] * 8),
    }
    found = scale_by_std(built.network, built.mesh, built.seed, frozen, built.to_devices(batch))
    keys = jax.random.split(jax.random.key(5), 8)
    encode = jax.jit(built.network.encode)
    scaled = encode(found, {"image": jnp.asarray(batch["image"])}, keys)
    np.testing.assert_allclose(scaled.std(), 1.0, rtol=0.02)
    with pytest.raises(ConfigError, match=r"scale_factor = 2\.0 should be left out"):
        build(LDM, "--config.first_stage.scale_factor=2.0")


# Compiled once and run once.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}
NO_LPIPS = "--config.loss.perceptual_weight=0.0"


def clips(stills):
    generator = np.random.default_rng(0)
    image = generator.uniform(-1, 1, (8, 4, 32, 32, 3)).astype(np.float32)
    return {"image": image, "image_only_indicator": np.full((8, 4), float(stills), np.float32)}


@pytest.mark.slow
def test_the_loss_of_still_clips_is_the_loss_of_their_frames():
    same = ("ch=8", "num_groups=4", "attn_type=vanilla", "use_quant_conv=False")
    same = (*(f"--config.model.{option}" for option in same), "--config.discriminator.ndf=8")
    video, image = build(VIDEO, NO_LPIPS), build(VAE, NO_LPIPS, *same)
    state, frozen = drawn(video.abstract_state()), video.frozen_constants() | {"lpips": {}}
    whole = state.params["autoencoder"]
    own = jax.eval_shape(image.init, jax.random.key(0)).params["autoencoder"]
    pick = lambda path, _: functools.reduce(lambda tree, key: tree[key.key], path, whole)
    params = {**state.params, "autoencoder": jax.tree_util.tree_map_with_path(pick, own)}
    evaluate = jax.jit(video.eval_step, **QUICKLY)
    still = evaluate(state.params, state.mutable, frozen, clips(True), 0)
    moving = evaluate(state.params, state.mutable, frozen, clips(False), 0)
    frames = {"image": clips(True)["image"].reshape(32, 32, 32, 3)}
    expected = jax.jit(image.eval_step, **QUICKLY)(params, state.mutable, frozen, frames, 0)
    assert set(still) == set(expected) and float(still["weight"]) == 32.0
    for name, value in expected.items():
        np.testing.assert_allclose(still[name], value, rtol=1e-4, err_msg=name)
    assert not np.isclose(moving["loss/rec"], still["loss/rec"], rtol=1e-3)


def test_only_what_is_trained_has_moments():
    state = build(VIDEO).abstract_state()
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state["autoencoder"]["optimizer"])
    names = [jax.tree_util.keystr(path) for path, _ in moments]
    decoder = len(jax.tree.leaves(state.params["autoencoder"]["decoder"]))
    assert sum("decoder" in name for name in names) == 2 * decoder
    assert not any("['encoder']" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [None, "time_"])
def test_of_a_first_stage_of_videos_the_decoder_is_trained(trainable):
    options = (f"train.trainable={trainable}", "loss.disc_start=0", "lr_schedule.warmup_steps=0")
    experiment = build(VIDEO, NO_LPIPS, *(f"--config.{option}" for option in options))
    state = drawn(experiment.abstract_state())
    step = jax.jit(experiment.train_step, **QUICKLY)
    frozen = experiment.frozen_constants() | {"lpips": {}}
    new, metrics = step(state, experiment.to_devices(clips(False)), frozen)
    assert all(np.isfinite(value) for value in metrics.values())
    assert float(metrics["scalars/d_weight"]) > 0.0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, new.params)
    assert all(jax.tree.leaves(moved["discriminator"]))
    assert not any(jax.tree.leaves(moved["autoencoder"]["encoder"]))
    decoder = jax.tree_util.tree_leaves_with_path(moved["autoencoder"]["decoder"])
    trains = {jax.tree_util.keystr(path): leaf for path, leaf in decoder}
    assert all(leaf == (trainable is None or "time_" in name) for name, leaf in trains.items())


@pytest.mark.slow
def test_pictures_of_clips_have_a_row_of_frames():
    experiment = build(VIDEO)
    log_images = experiment.task.pictures(None, max_images=2)
    shown = log_images(drawn(experiment.abstract_state()), clips(False))
    assert {"inputs", "reconstructions_ema", "samples", "clips"} <= set(shown)
    for name, value in shown.items():
        assert value.shape == ((2, 2, 32, 32, 3) if "logits" in name else (2, 4, 32, 32, 3)), name
    np.testing.assert_array_equal(shown["inputs"], clips(False)["image"][:2])


@pytest.mark.slow
def test_a_decoder_of_videos_trains_alike_with_rows_and_frames_split():
    def losses(*mesh, devices=1):
        experiment = build(VIDEO, "--config.loss.disc_start=0", *mesh, devices=devices)
        state, step, found = experiment.init_state(), jax.jit(experiment.train_step), []
        for _ in range(3):
            batch = experiment.to_devices(clips(False))
            state, metrics = step(state, batch, experiment.random_frozen())
            found.append([float(metrics[name]) for name in ("loss/rec", "loss/disc", "loss/g")])
        return np.array(found)

    split = losses("--config.mesh.data=2", "--config.mesh.context=4", devices=8)
    np.testing.assert_allclose(split, losses(), rtol=1e-4)
