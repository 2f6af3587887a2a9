"""Every shipped config, in every variant, builds abstractly; every kind of mistake in one is told
in a sentence."""

import logging
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources import folder_content
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config

CONFIGS = sorted(pathlib.Path("configs").glob("*.py"))
VARIANTS = [f"{path}{variant}" for path in CONFIGS for variant in ("", ":tiny")]
VARIANTS += [f"configs/mnist.py:{name}" for name in ("flow", "meanflow", "consistency")]
VARIANTS += [f"configs/sd15.py:{name}" for name in ("inpaint", "edit", "inpaint_tiny", "edit_tiny")]


# Parameters of what is trained, as released or as this program's documents say.
COUNTS = {
    "configs/mnist.py": {"network": 661_668},
    "configs/cifar10.py": {"network": 44_179_459},
    "configs/sd15.py": {"network": 859_520_964},
    "configs/sd15.py:inpaint": {"network": 859_535_364},
    "configs/sd15.py:edit": {"network": 859_532_484},
    "configs/sd21.py": {"network": 865_910_724},
    "configs/sd21.py:768v": {"network": 865_910_724},
    "configs/sd21.py:inpaint": {"network": 865_925_124},
    "configs/sdxl.py": {"network": 2_567_463_684},
    "configs/sdxl_refiner.py": {"network": 2_259_526_660},
    "configs/svd.py": {"network": 1_524_623_082},
    "configs/sv3d.py": {"network": 1_523_967_722},
    "configs/sv3d.py:p": {"network": 1_525_278_442},
    "configs/sv4d.py": {"network": 1_996_625_322},
    "configs/sv4d.py:2": {"network": 2_010_961_338},
    "configs/vae_kl_f8.py": {"autoencoder": 83_653_863, "discriminator": 2_765_633},
    "configs/vq_f4.py": {"autoencoder": 55_322_782, "discriminator": 2_765_633},
}
# Frozen: OpenAI's ViT-L/14 text tower, OpenCLIP's of ViT-H and ViT-bigG, the autoencoder kl-f8.
FROZEN = {
    "configs/sd15.py": 123_060_480 + 83_653_863,
    "configs/sd21.py": 354_032_640 + 83_653_863,
    "configs/sdxl.py": 123_060_480 + 694_659_840 + 83_653_863,
    "configs/sdxl_refiner.py": 694_659_840 + 83_653_863,
}
QUICK = ["configs/mnist.py", *(path for path in VARIANTS if path.endswith("tiny"))]
WHOLE = sorted({*VARIANTS, *COUNTS} - {*QUICK})


def quick_or_slow(path, *slow):
    return pytest.param(path, marks=pytest.mark.slow) if any(s in path for s in slow) else path


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# They differ little from other configs, or have tests of their own; CI looks at them too.
LATER = (
    "/sv",
    "/sd21",
    "inpaint",
    "edit",
    "/sdxl_refiner",
    "/vq_f4",
    "/emoji_ldm",
    "/moving_digits",
)


@pytest.mark.parametrize("path", [quick_or_slow(path, *LATER) for path in QUICK])
def test_every_config_builds_and_its_step_traces(path):
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in VARIANTS if "tiny" not in p] + ["configs/sd21.py:768v"]
)
def test_the_step_of_every_whole_config_traces(path):
    check(path)


def check(path):
    built = make_experiment(load_config(path, ["--config.train.batch_size=8"]))
    state = built.abstract_state()
    batch, frozen = built.abstract_batch(), built.abstract_frozen()
    new, metrics = jax.eval_shape(built.train_step, state, batch, frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("path", [quick_or_slow(path, *LATER) for path in COUNTS])
def test_networks_have_the_parameters_of_the_released_ones(path):
    built = make_experiment(load_config(path, ["--config.train.batch_size=8"]))
    params = jax.eval_shape(built.init, jax.random.key(0)).params
    assert {name: count(params[name]) for name in COUNTS[path]} == COUNTS[path]
    if path in FROZEN:
        frozen = jax.eval_shape(built.task.init_frozen, jax.random.key(0))
        assert count(frozen) == FROZEN[path]


MISTAKES = [
    ("--config.model.out_channels=3", r"config\.model\.out_channels = 3 should be 1, the channels"),
    ("--config.seed=-1", r"config\.seed = -1 should be between 0 and 4294967295"),
    ("--config.seed=4294967296", r"config\.seed = 4294967296 should be between"),
    ("--config.train.accumulate=0", r"config\.train\.accumulate = 0 should be at least 1"),
    ("--config.train.num_steps=-3", r"config\.train\.num_steps = -3 should be at least 1"),
    ("--config.optimizer.mu_dtyp=x", r"config\.optimizer\.mu_dtyp = 'x' is not an option"),
    ("--config.optimizer.eps='a'", r"config\.optimizer\.eps = 'a' should be"),
    ("--config.optimizer.ema_use_num_updates=3", r"ema_use_num_updates = 3 should be bool"),
    ("--config.mesh.tensor=8", r"config\.mesh\.tensor = 8 splits no layer"),
    ("--config.conditioning.embedders.label.ucg_rate=2.0", r"ucg_rate = 2\.0 should be between 0"),
    ("--config.conditioning.embedders.label.ucg_rate=0.0", r"guidance\.scale = 2\.0 needs an emb"),
    ("--config.hooks.early_stopping.patience=x", r"early_stopping\.patience = 'x' should be int"),
    ("--config.data.splits.validation=None", r"config\.hooks\.validation needs a split"),
    (
        "--config.train.num_step=3",
        r"config\.train\.num_step = 3 is not an option; did you mean 'num_s",
    ),
    ("--config.trian.num_steps=3", r"config\.trian is not a section; did you mean 'train'"),
    ("--config.train.accumulate=two", r"config\.train\.accumulate = 'two' should be int"),
    ("--config.model.num_classes=5", r"config\.model\.num_classes = 5 should be 11"),
    ("--config.model.name=unett", r"config\.model\.name = 'unett' is unknown; did you mean 'unet'"),
    ("--config.sampler.name=dim", r"config\.sampler\.name = 'dim' is unknown.*ddim"),
    ("--config.guidance.name=cgf", r"config\.guidance\.name = 'cgf' is unknown.*cfg"),
    (
        "--config.schedule.name=cosin",
        r"config\.schedule\.name = 'cosin' is unknown.*did you mean 'cosine'",
    ),
    (
        "--config.loss.loss_type=l3",
        r"config\.loss\.loss_type = 'l3' should be one of 'l2', 'l1', 'huber'",
    ),
    (
        "--config.optimizer.name=adamww",
        r"config\.optimizer\.name = 'adamww' is unknown; did you mean",
    ),
    ("--config.lr_schedule.name=cosin", r"config\.lr_schedule\.name = 'cosin' is unknown"),
    ("--config.conditioning.key=amd", r"config\.conditioning\.key = 'amd' is unknown.*adm"),
    ("--config.train.batch_size=12", r"config\.train\.batch_size = 12 should be a multiple of 8"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_wrong_value_is_told_with_path_value_and_choices(override, message):
    config = load_config("configs/mnist.py:tiny", [override])
    with pytest.raises(ValueError, match=message):
        make_experiment(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.chanels", 3, r"config\.model\.chanels = 3 is not an option; did you mean"),
        ("optimiser", 1, r"config\.optimiser is not a section; did you mean 'optimizer'"),
        (
            "train.batchsize",
            3,
            r"config\.train\.batchsize = 3 is not an option; did you mean 'batch_size'",
        ),
        (
            "data.batches.image_sise",
            3,
            r"image_sise = 3 is not an option; did you mean 'image_size'",
        ),
        ("data.splits.trian", "x", r"config\.data\.splits\.trian = 'x' is not an option"),
        (
            "optimizer.beta1",
            0.9,
            r"config\.optimizer\.beta1 = 0\.9 is not an option; choose from b1",
        ),
        (
            "conditioning.embedders.label.classes",
            3,
            r"embedders\.label\.classes = 3 is not an option",
        ),
        ("hooks.scalar", 3, r"config\.hooks\.scalar is not a section; did you mean 'scalars'"),
        ("checkpoint.keep", 3, r"config\.checkpoint\.keep = 3 is not an option"),
    ],
)
def test_an_unknown_key_is_told_with_path_and_choices(path, value, message):
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    with pytest.raises(ValueError, match=message):
        make_experiment(config)


@pytest.mark.parametrize(
    "section", ["model", "sampler", "guidance", "optimizer", "schedule", "loss"]
)
def test_a_missing_name_is_told_with_the_choices(section):
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        del config[section].name
    with pytest.raises(ConfigError, match=rf"config\.{section}\.name is missing; choose from"):
        make_experiment(config)


def test_keeping_the_best_needs_a_validation():
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        del config.hooks.validation
    with pytest.raises(
        ConfigError, match=r"config\.checkpoint\.keep_best needs config\.hooks\.validation"
    ):
        make_experiment(config)


def test_fsdp_splits_large_parameters_and_their_moments():
    config = load_config("configs/mnist.py", ["--config.mesh.fsdp=8", "--config.mesh.data=1"])
    state = make_experiment(config).abstract_state()
    leaves = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size >= 2**16]
    assert leaves and all("fsdp" in str(leaf.sharding.spec) for leaf in leaves)


def test_a_missing_section_is_named():
    config = load_config("configs/mnist.py:tiny", [])
    with config.unlocked():
        del config.data
    with pytest.raises(ConfigError, match=r"config\.data is missing"):
        make_experiment(config)


@pytest.mark.parametrize(
    ("files", "embedder", "words"),
    [
        ({}, None, "classes: none; captions: none"),
        ({"a/0.png": None, "b/0.png": None}, "class_label", "classes: 2 (a, b); captions: none"),
        ({"0.txt": "red", "1.txt": "blue"}, "transformer_text", "captions: text files"),
        ({"metadata.csv": "file_name,caption\n0.png,red\n1.png,blue"}, "transformer_text", ".csv"),
        (
            {"metadata.jsonl": '{"file_name": "0.png", "text": "red"}'},
            "transformer_text",
            "captions: metadata.jsonl",
        ),
        ({"metadata.csv": "file_name,label\n0.png,red\n1.png,blue"}, "class_label", "2 (blue, r"),
    ],
)
def test_pictures_are_conditioned_on_what_their_folder_holds(
    tmp_path, caplog, files, embedder, words
):
    folder_content.say_once.cache_clear()
    pictures = [name for name in files if name.endswith(".png")] or ["0.png", "1.png"]
    for name in (*pictures, *files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png"):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text(files[name])
    with caplog.at_level(logging.INFO):
        folder = f"--config.data.source.folder={tmp_path}"
        config = load_config("configs/pictures.py:tiny", [folder])
    lines = [line for line in caplog.messages if line.startswith(str(tmp_path))]
    assert len(lines) == 1 and words in lines[0]
    network = make_experiment(config).network
    sections = config.conditioning.embedders if "conditioning" in config else {}
    assert [s.name for s in sections.values()] == [embedder] * (embedder is not None)
    assert len(network.embedders) == len(sections)
    assert config.guidance.name == ("none" if embedder is None else "cfg")
    whole = load_config("configs/pictures.py", [folder])
    assert [*whole.to_dict()] == [*config.to_dict()] and whole.guidance == config.guidance
    own = load_config("configs/pictures.py", [folder, "--config.conditioning.key=none"])
    assert "embedders" not in own.conditioning and own.guidance.name == "none"


def test_pictures_count_as_their_folder_says(tmp_path):
    for name in "ab":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("file_name,repeats,weight\na.png,40,1\nb.png,1,0.5")
    given = [f"--config.data.source.folder={tmp_path}"]
    batches = load_config("configs/pictures.py:tiny", given).data.batches
    assert (batches.repeats_key, batches.weight_key) == ("repeats", "weight")
    own = load_config("configs/pictures.py:tiny", [*given, "--config.data.batches.weight_key=None"])
    assert own.data.batches.weight_key is None and own.data.batches.repeats_key == "repeats"
