"""Training from a latent cache is training online; a stale one is refused with what differs."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from diffusion_jax.data.latent_shards import claim_folder
from diffusion_jax.data.records import Record
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs import latent_cache
from diffusion_jax.runs.arguments import arguments_of
from diffusion_jax.runs.latent_cache import image_reader, make_latent_cache
from diffusion_jax.runs.latent_key import describe_cache
from diffusion_jax.train.step import jit_train_step

SMALL = [
    "data.batches.crop=center", "data.batches.random_flip=True", "data.batches.image_size=16",
    "data.batches.buckets=False", "data.batches.num_threads=0", "data.batches.cache=True",
    "train.batch_size=4",
    "first_stage.ch=8", "first_stage.num_groups=4", "first_stage.attn_type=none",
    "model.model_channels=8", "model.channel_mult=(1,)", "model.num_groups=4",
    "model.attention_resolutions=(1,)", "model.transformer_depth=(1,)", "model.num_head_channels=8",
    "model.context_dim=16", "model.adm_in_channels=8", "loss.offset_noise_level=0.0",
]  # fmt: skip
for tower in ("clip", "open_clip"):
    SMALL += [
        f"conditioning.embedders.{tower}.{option}"
        for option in ("width=8", "num_layers=1", "num_heads=1", "mlp_dim=8", "ucg_rate=0.5")
    ]
SMALL += ["conditioning.embedders.clip.legacy_ucg_value=nothing"]
SMALL += ["conditioning.embedders.open_clip.projection_dim=8"]
SMALL += ["conditioning.embedders.open_clip.ucg_group=None"]
SIZES = ("original_size", "crop_top_left", "target_size")
KEPT = ["latent_cache.dtype=float32", "latent_cache.shard_size=4", "latent_cache.batch_size=4"]


def build(*overrides):
    config = load_config("configs/sdxl.py:tiny", [f"--config.{o}" for o in [*SMALL, *overrides]])
    with config.unlocked():
        for name in SIZES:
            del config.conditioning.embedders[name]
    return make_experiment(config, devices=jax.devices()[:1])


def source():
    """Ten pictures, the fourth of which is damaged, some with two captions."""
    numbers = np.random.default_rng(0)
    records = [
        {
            "image": numbers.integers(0, 256, (20, 17 + i, 3), dtype=np.uint8),
            "captions": [f"picture {i}", f"drawing {i}"][: 1 + i % 2],
        }
        for i in range(10)
    ]
    records[3]["image"] = b"no image"
    return records


@pytest.fixture(scope="module")
def online():
    return build()


@pytest.fixture(scope="module")
def frozen(online):
    return online.random_frozen()


BUILD_ENCODER = latent_cache._build_encoder


@pytest.fixture(scope="module")
def one_encoder():
    """Every cache of this file through one encoder, which is compiled once."""
    made, original = [], latent_cache._build_encoder

    def build_encoder(*arguments):
        made.extend([] if made else [original(*arguments)])
        return made[0]

    patch = pytest.MonkeyPatch()
    patch.setattr(latent_cache, "_build_encoder", build_encoder)
    yield made
    patch.undo()


def perturbed(state):
    """A state without zero output layers, behind which nothing that the network reads shows."""
    leaves, tree = jax.tree.flatten(state.params)
    numbers = np.random.default_rng(1)
    leaves = [
        jax.device_put(leaf + 0.1 * numbers.standard_normal(leaf.shape, np.float32), leaf.sharding)
        for leaf in leaves
    ]
    return state._replace(params=tree.unflatten(leaves))


def losses(built, frozen, batches):
    state = perturbed(built.init_state())
    step_fn = jit_train_step(built.train_step, built.abstract_state())
    found = []
    for _, batch in zip(range(4), batches.iterate(0), strict=False):
        state, metrics = step_fn(state, built.to_devices(batch), frozen)
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found)


@pytest.fixture(scope="module")
def online_losses(online, frozen):
    batches = online.data.train_batches(source(), batch_size=4, seed=0)
    return losses(online, frozen, batches)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_the_loss_curve_is_that_of_online_training(
    tmp_path, monkeypatch, frozen, online_losses, one_encoder, dtype, tolerance
):
    built = build(*KEPT, f"latent_cache.folder={tmp_path}", f"latent_cache.dtype={dtype}")
    monkeypatch.setattr(latent_cache, "load_frozen", lambda *_: frozen)
    cached = latent_cache.train_from_cache(built, source())
    columns = set(built.to_devices(next(cached.batches.iterate(0))))
    texts = {f"cached/{name}" for name in ("clip/0", "open_clip/0", "open_clip/1")}
    assert columns == {"moments", *texts}
    assert np.abs(cached.null["null_outputs"]["cached/clip/0"]).max() > 0  # of "nothing"
    assert np.abs(cached.null["null_outputs"]["cached/open_clip/1"]).max() == 0
    found = losses(built, cached.frozen | cached.null, cached.batches)
    np.testing.assert_allclose(found, online_losses, rtol=tolerance)
    assert np.ptp(found[:, 0]) > 0.01


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_and_two_processes_make_the_same_bytes(
    tmp_path, monkeypatch, frozen, one_encoder
):
    def make(name, **place):
        built = build(*KEPT, f"latent_cache.folder={tmp_path / name}")
        return make_latent_cache(built, frozen, source(), **place)

    whole = make("whole")
    assert whole.shards.num_shards == 3
    for index in (1, 0):
        if index:
            with pytest.raises(ValueError, match="not complete: 2 of its 3 shards are missing"):
                make("both", process_index=1, process_count=2)
        else:
            make("both", process_index=0, process_count=2)
    write = latent_cache.write_shard

    def killed(shards, shard, *rest):
        if shard == 1:
            raise KeyboardInterrupt
        write(shards, shard, *rest)

    monkeypatch.setattr(latent_cache, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        make("torn")
    assert len(contents(tmp_path / "torn")) == 2 + 2
    monkeypatch.setattr(latent_cache, "write_shard", write)
    before = (tmp_path / "torn" / "00000-of-00003.arrayrecord").stat().st_mtime_ns
    make("torn")
    assert (tmp_path / "torn" / "00000-of-00003.arrayrecord").stat().st_mtime_ns == before
    (tmp_path / "whole" / "null.bin").unlink()
    make("whole")
    assert (
        contents(tmp_path / "whole") == contents(tmp_path / "both") == contents(tmp_path / "torn")
    )


def test_pictures_are_those_of_online_batches(tmp_path, monkeypatch, frozen, one_encoder):
    built = build(*KEPT, f"latent_cache.folder={tmp_path}")
    cache = make_latent_cache(built, frozen, source())
    cached = built.data.cached_batches(cache, source(), batch_size=4, seed=0)
    online = built.data.train_batches(source(), batch_size=4, seed=0)
    with_images = image_reader(built, source())
    for _, ours, theirs in zip(range(5), cached.iterate(0), online.iterate(0), strict=False):
        assert "image" not in ours
        shown = with_images(ours, 3)
        assert set(shown) == set(theirs)
        for name, column in theirs.items():
            np.testing.assert_array_equal(shown[name], column[:3])
        assert with_images(theirs, 2)["image"].shape == (2, 16, 16, 3)


CLIP = "config.conditioning.embedders.clip"
STALE = [
    ("data.batches.image_size=32", "data.batches.image_size = 16 .this config has 32."),
    ("data.batches.resize=area", "data.batches.resize = 'bicubic' .this config has 'area'."),
    ("data.batches.crop=stretch", "data.batches.crop = 'center' .this config has 'stretch'."),
    ("data.batches.pad=1", "data.batches.pad = 0 .this config has 1."),
    ("data.batches.random_flip=False", "data.batches.random_flip = True .this config has False."),
    ("data.splits.train=train[:50%]", "data.splits.train = 'train' .this config has 'train.:50"),
    (
        "data.source={'name': 'mnist_subset'}",
        "data.source.name = 'openmoji' .this config has 'mni",
    ),
    ("first_stage.resamp_with_conv=False", "first_stage.resamp_with_conv = True .this config has"),
    ("conditioning.embedders.clip.layer_idx=0", f"{CLIP}.layer_idx = 1 .this config has 0."),
    ("conditioning.embedders.clip.legacy_ucg_value=none", f"{CLIP}.null_value = '.*this config"),
    ("latent_cache.dtype=float16", "latent_cache.dtype = 'float32' .this config has 'float16'."),
    ("latent_cache.shard_size=5", "latent_cache.shard_size = 4 .this config has 5."),
    ("latent_cache.text=False", f"latent_cache.text = True .this config has False., {CLIP}.* more"),
    ("data.batches.buckets=True", "data.batches.buckets = False .this config has True."),
]


@pytest.fixture(scope="module")
def key(frozen):
    return describe_cache(build(*KEPT, "latent_cache.folder=x"), frozen, source())


@pytest.mark.parametrize(("override", "message"), STALE)
def test_a_stale_cache_is_refused(tmp_path, frozen, key, override, message):
    claim_folder(tmp_path / "cache", key)
    changed = build(*KEPT, "latent_cache.folder=x", override)
    with pytest.raises(ValueError, match=message):
        claim_folder(tmp_path / "cache", describe_cache(changed, frozen, source()))


def test_weights_and_data_of_another_kind_are_refused(tmp_path, frozen, key):
    built = build(*KEPT, "latent_cache.folder=x")
    claim_folder(tmp_path, key)

    def refused(message, frozen, records):
        with pytest.raises(ValueError, match=message):
            claim_folder(tmp_path, describe_cache(built, frozen, records))

    bias = frozen["first_stage"]["encoder"]["conv_in"]["bias"]
    encoder = frozen["first_stage"]["encoder"] | {"conv_in": {"bias": bias + 1e-6}}
    refused(
        "made with the weights of config.first_stage = '.*' .this config has '.*'.: choose another",
        frozen | {"first_stage": frozen["first_stage"] | {"encoder": encoder}},
        source(),
    )
    texts = frozen["conditioner"] | {"clip": frozen["conditioner"]["open_clip"]}
    refused(f"the weights of {CLIP} = '", frozen | {"conditioner": texts}, source())
    network = built.network
    key, (name, tokenizer) = next(iter(network.tokenize.items()))
    other = {key: (name, tokenizer._replace(tokenizer=Tokenizer(BPE())))}
    network = network._replace(tokenize=network.tokenize | other)
    drawing = built.drawing._replace(network=network)
    built = built._replace(task=built.task._replace(drawing=drawing))
    refused(f"the vocabulary of {CLIP} = '", frozen, source())
    built = build(*KEPT, "latent_cache.folder=x")
    refused("the number of records = 10 .this config has 9.", frozen, source()[:9])


def test_the_scale_factor_and_dropout_do_not_matter(frozen, key):
    changed = build(
        *KEPT, "latent_cache.folder=y", "first_stage.scale_factor=0.5", "latent_cache.batch_size=3",
        "conditioning.embedders.clip.ucg_rate=0.1", "train.batch_size=2",
    )  # fmt: skip
    assert describe_cache(changed, frozen, source()) == key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batches.crop=random", "crop = 'random' should be 'center' or 'stretch' with config"),
        ("latent_cache.dtype=float8", "latent_cache.dtype = 'float8' should be one of 'float16'"),
        ("latent_cache.shard_size=0", "latent_cache.shard_size = 0 should be at least 1"),
        ("latent_cache.size=0", "latent_cache.size = 0 is not an option"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message):
        build("latent_cache.folder=x", override)


def test_a_cache_needs_a_first_stage():
    config = load_config("configs/mnist.py:tiny", ["--config.latent_cache.folder=x"])
    with pytest.raises(ConfigError, match="config.latent_cache needs config.first_stage"):
        make_experiment(config)


def test_texts_need_captions(tmp_path, frozen, one_encoder):
    built = build(*KEPT, f"latent_cache.folder={tmp_path}")
    bare = [{"image": record["image"]} for record in source()]
    with pytest.raises(ValueError, match="config.latent_cache.text = True needs captions"):
        make_latent_cache(built, frozen, bare)


@pytest.mark.parametrize("place", [0, -1, None])
def test_the_frame_that_conditions_a_clip_is_kept(place):
    """The first one, or the last of an orbit; mirrored besides."""
    clip = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    record = Record(clip, (2, 2), (2, 2), None, None, 0)
    encoder = latent_cache._Encoder(1, lambda image: image[..., :2], lambda texts: {}, {})
    chunk = latent_cache._Chunk(0, 0, np.array([0]))
    (entry,) = latent_cache._encode(encoder, chunk, [record], True, place)
    if place is None:
        assert not entry.pixels
    else:
        kept = entry.pixels["cond_frames_without_noise"]
        np.testing.assert_array_equal(kept, [clip[place], clip[place, :, ::-1]])


VIDEO = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "weights": "random"}


def build_video(*overrides, angles=False):
    """The tiny image-to-video model in latents: its frame is encoded with noise of its own.

    angles: it also reads where the camera of each frame is, and its picture is the last frame.
    """
    config = load_config("configs/moving_digits.py:tiny", [f"--config.{o}" for o in overrides])
    with config.unlocked():
        config.data.batches.random_flip = True
        config.train.batch_size = 4
        config.first_stage = {"name": "autoencoder_kl", "scale_factor": 0.5, **VIDEO}
        frame = {"name": "encoded_frames", "input_key": "cond_frames", "ucg_rate": 0.1, **VIDEO}
        config.conditioning.embedders.frame = frame
        if angles:
            config.data.batches.random_flip = False
            config.conditioning.frame_fit = "object"
            for name in ("polars_rad", "azimuths_rad"):
                number = {"name": "numbers", "size": 1, "outdim": 16, "frames": 4}
                config.conditioning.embedders[name] = number | {"input_key": name}
    return make_experiment(config, devices=jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("angles", [False, True])
def test_videos_from_a_cache_train_as_online_with_their_frame(tmp_path, monkeypatch, angles):
    numbers = np.random.default_rng(0)
    clips = [
        {
            "video": numbers.integers(0, 256, (4 if n or angles else 1, 16, 16, 3), dtype=np.uint8),
            "fps": 8.0,
            "elevations": numbers.uniform(-20.0, 60.0, 4).astype(np.float32),
            "azimuths": numbers.uniform(0.0, 360.0, 4).astype(np.float32),
        }
        for n in range(10)
    ]
    online = build_video(angles=angles)
    frozen = online.random_frozen()
    wanted = losses(online, frozen, online.data.train_batches(clips, batch_size=4, seed=0))
    cache = ("latent_cache={}", *KEPT, f"latent_cache.folder={tmp_path}")
    built = build_video(*cache, angles=angles)
    monkeypatch.setattr(latent_cache, "load_frozen", lambda *_: frozen)
    monkeypatch.setattr(latent_cache, "_build_encoder", BUILD_ENCODER)  # another test's may be here
    cached = latent_cache.train_from_cache(built, clips)
    rows = next(cached.batches.iterate(0))
    assert "moments" in rows and rows["cond_frames_without_noise"].shape == (4, 16, 16, 3)
    assert ("azimuths_rad" in rows) == angles
    # A plan and the FLOPs of this run are of these arrays.
    planned, read = arguments_of(built)[1], built.to_devices(rows)
    types = {name: (leaf.shape, leaf.dtype) for name, leaf in read.items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in planned.items()} == types
    np.testing.assert_allclose(losses(built, cached.frozen, cached.batches), wanted, rtol=1e-5)
    shown, place = cached.with_images(rows, 2), -1 if angles else 0
    np.testing.assert_array_equal(shown["image"][:, place], rows["cond_frames_without_noise"][:2])
    assert "cond_frames_without_noise" not in shown
