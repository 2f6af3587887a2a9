"""A config file is executed once, and its values are overridden by one grammar."""

import textwrap

import pytest

from diffusion_jax.experiment.config import files as config_files
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import (
    find_config,
    load_config,
    load_config_beside_file,
)

MNIST = "configs/mnist.py"
FILE = """
import ml_collections

VARIANTS = ("tiny", "huge")
WIDTH = 8


def get_config(variant=""):
    config = ml_collections.ConfigDict()
    config.train = dict(num_steps=10, rate=0.5, flag=False, word="a", path=None)
    config.model = dict(name="net", mult=(1, 2), scales=(0.5,), words=("x",), width=WIDTH)
    config.lr = dict(decay_steps=config.train.get_oneway_ref("num_steps"), variant=variant)
    config.both = config.model.get_ref("width")
    config.count = ml_collections.config_dict.placeholder(int)
    return config
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(FILE)
    return str(file)


def load(path, *overrides):
    return load_config(path, [f"--config.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.num_steps", "12", 12),
        ("train.rate", "2", 2.0),
        ("train.rate", "-1e-3", -1e-3),
        ("train.flag", "true", True),
        ("train.flag", "True", True),
        ("train.word", "b=c,d", "b=c,d"),
        ("train.word", "12", "12"),
        ("train.word", "true", "true"),
        ("train.word", "'None'", "None"),
        ("train.word", "'delete'", "delete"),
        ("train.word", "", ""),
        ("train.word", "None", None),
        ("train.num_steps", "None", None),
        ("train.path", "~/a b.ckpt", "~/a b.ckpt"),
        ("train.path", "3", 3),
        ("model.mult", "(1,2,4)", (1, 2, 4)),
        ("model.mult", "1,2,4", (1, 2, 4)),
        ("model.mult", "[3]", (3,)),
        ("model.mult", "3", (3,)),
        ("model.words", "a/b,c", ("a/b", "c")),
        ("model.words", "('a','b')", ("a", "b")),
        ("model.new", "1,2", (1, 2)),
        ("model.new", "1e-4", 1e-4),
        ("model.new", "false", False),
        ("model.new", "None", None),
        ("model.new", "train[:95%]", "train[:95%]"),
        ("count", "3", 3),
        ("new.section.key", "3", 3),
        ("new", "{'a': {'b': 1}}", {"a": {"b": 1}}),
        ("model", "{'name': 'other'}", {"name": "other"}),
    ],
)
def test_a_text_becomes_a_value_of_the_type_in_the_file(path, key, text, value):
    config = load(path, f"{key}={text}").to_dict()
    for part in key.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps=many", r"config\.train\.num_steps = 'many' should be int"),
        ("train.num_steps=1.5", r"config\.train\.num_steps = 1\.5 should be int"),
        ("train.num_steps=true", r"config\.train\.num_steps = True should be int"),
        ("train.rate=fast", r"config\.train\.rate = 'fast' should be float"),
        ("train.rate=True", r"config\.train\.rate = True should be float"),
        ("train.flag=1", r"config\.train\.flag = 1 should be bool"),
        ("train=3", r"config\.train = 3 should be a dict of keys"),
        ("train=None", r"config\.train = None should be a dict of keys"),
        ("count=x", r"config\.count = 'x' should be int"),
        (
            "train.num_steps.x=1",
            r"num_steps\.x = '1' cannot be set: 'num_steps' is a value and has",
        ),
        ("train.num_step=delete", r"num_step is not there to be deleted; did you mean 'num_steps'"),
        ("train.num_steps", r"--config\.train\.num_steps should be --config\.section\.key=value"),
        ("train..x=3", r"--config\.train\.\.x=3 should be --config\.section\.key=value"),
    ],
)
def test_a_wrong_override_is_one_sentence(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(path, override)
    with pytest.raises(ConfigError, match="should be --config.section.key=value"):
        load_config(path, ["train.num_steps=3"])


def test_delete_removes_a_key_or_a_section_which_may_come_back_with_another_type(path):
    config = load(path, "model=delete", "train.num_steps=delete", "train.num_steps=(1,2)")
    assert "model" not in config and config.train.num_steps == (1, 2)


def test_a_reference_follows_its_source_until_it_is_set_itself(path):
    followed = load(path, "train.num_steps=12")
    assert followed.train.num_steps == followed.lr.decay_steps == 12
    own = load(path, "lr.decay_steps=7", "train.num_steps=12")
    assert (own.train.num_steps, own.lr.decay_steps) == (12, 7)
    both = load(path, "both=3")
    assert both.model.width == both.both == 3


def test_values_of_python_are_taken_as_they_are(path):
    overrides = {"train.num_steps": 3, "train.rate": 1, "model.mult": [4], "train.word": "None"}
    config = load_config(path, overrides | {"model.width": "delete", "new.x": ("a",)})
    assert (config.train.num_steps, config.train.rate, config.train.word) == (3, 1.0, "None")
    assert config.model.mult == (4,) and "width" not in config.model and config.new.x == ("a",)
    with pytest.raises(ConfigError, match=r"config\.train\.num_steps = '3' should be int"):
        load_config(path, {"train.num_steps": "3"})


def test_the_file_is_executed_once(tmp_path):
    log = tmp_path / "log"
    file = tmp_path / "own.py"
    file.write_text(f"open({str(log)!r}, 'a').write('executed ')\n{FILE}")
    load(str(file) + ":tiny", "train.num_steps=3", "model.new=4")
    assert log.read_text() == "executed "
    config, (_, alone) = load_config_beside_file(str(file), {"train.num_steps": 3})
    assert log.read_text() == "executed executed "
    plain = load(str(file))
    assert alone == plain and alone.train.num_steps != config.train.num_steps == 3


def test_variants_are_told(path, tmp_path):
    assert load(path).lr.variant == "" and load(f"{path}:huge").lr.variant == "huge"
    with pytest.raises(
        ConfigError, match="variant 'tny' is unknown; did you mean 'tiny'. choose f"
    ):
        load(f"{path}:tny")
    with pytest.raises(ConfigError, match=r"mnist\.py.*variant 'huge'.*choose.* tiny"):
        load_config(f"{MNIST}:huge")
    plain = tmp_path / "plain.py"
    plain.write_text("def get_config():\n    return 3\n")
    with pytest.raises(ConfigError, match="takes 0 positional arguments"):
        load(f"{plain}:tiny")
    with pytest.raises(ConfigError, match=r"get_config\(\) = 3 should be a ConfigDict"):
        load(str(plain))


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("x = (", 1, "SyntaxError: '\\(' was never closed"),
        ("import ml_collections\n\nx = nothing", 3, "NameError: name 'nothing' is not defined"),
        ("def get_config():\n    return {}['a']", 2, "KeyError: 'a'"),
        ("def get_config():\n    raise ValueError('no such size')", 2, "no such size"),
        ("import no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_error_in_the_file_is_told_with_its_line(tmp_path, body, line, message):
    file = tmp_path / "wrong.py"
    file.write_text(body)
    with pytest.raises(ConfigError, match=rf"wrong\.py:{line}: {message}"):
        load(str(file))
    file.write_text("y = 1")
    with pytest.raises(ConfigError, match="wrong.py: AttributeError: .*'get_config'"):
        load(str(file))


def test_a_bare_name_is_a_shipped_config(tmp_path, monkeypatch):
    checkout = config_files.SHIPPED[1]
    assert find_config("mnist:tiny") == (checkout / "mnist.py", "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_config("mnist:tiny").to_dict() == load_config(f"{checkout}/mnist.py:tiny").to_dict()
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "mnist.py").write_text(textwrap.dedent(FILE))
    monkeypatch.setattr(config_files, "SHIPPED", (installed, checkout))
    assert load_config("mnist").model.name == "net"
    for name in ("mnist", "mine"):
        (tmp_path / name).write_text(FILE.replace("net", "here"))
    assert load_config("mnist").model.name == "net"
    assert load_config("./mnist").model.name == "here"
    with pytest.raises(FileNotFoundError, match="mine is no shipped config.* path: ./mine; choose"):
        load_config("mine")


def test_a_colon_may_be_part_of_a_path(tmp_path):
    file = tmp_path / "run:2" / "config.py"
    file.parent.mkdir()
    file.write_text(FILE)
    assert load_config(str(file), {"train.num_steps": 3}).train.num_steps == 3


def test_a_missing_file_is_named_with_what_there_is():
    with pytest.raises(FileNotFoundError, match="configs/nothing.py does not exist; choose from c"):
        load_config("configs/nothing.py")
    with pytest.raises(FileNotFoundError, match="mnst.py does not exist; did you mean 'mnist.py'"):
        load_config("configs/mnst.py:tiny")
    with pytest.raises(
        FileNotFoundError, match="mnst does not exist; did you mean 'mnist'. choose"
    ):
        load_config("mnst")
    with pytest.raises(FileNotFoundError, match="nowhere/x.py does not exist; .*choose from cifar"):
        load_config("nowhere/x.py")
    with pytest.raises(FileNotFoundError, match="nowhere.py does not exist"):
        load_config(f"{config_files.SHIPPED[1]}/nowhere.py")


def test_the_shipped_configs_take_overrides():
    config = load_config(f"{MNIST}:tiny", {"train.num_steps": 12, "model.channel_mult": (1, 2)})
    assert config.train.num_steps == 12 and config.lr_schedule.decay_steps == 12
    assert config.model.channel_mult == (1, 2)
    overrides = ["--config.train.ckpt_path=runs/a", "--config.train.ckpt_ema=true"]
    overrides += ["--config.train.ignore_keys=('network/out_2',)", "--config.mesh.fsdp=2"]
    config = load_config(MNIST, overrides)
    assert config.train.ckpt_path == "runs/a" and config.train.ckpt_ema is True
    assert config.train.ignore_keys == ("network/out_2",) and config.mesh.fsdp == 2
    overrides = ["--config.train.ckpt_path=runs/a.safetensors", "--config.train.keep_dims=4"]
    config = load_config("configs/sdxl.py:tiny", overrides)
    assert config.train.ckpt_path == "runs/a.safetensors" and config.train.keep_dims == 4


def test_names_of_other_tools_are_spelled_out():
    config = load_config(MNIST, ["--config.sampler.name=DPM++ 2M Karras"])
    assert config.sampler.name == "dpmpp_2m" and config.discretization.name == "karras"
    config = load_config(MNIST, {"sampler.num_steps": 2, "sampler.name": "turbo"})
    assert config.sampler.to_dict() == {"name": "euler_ancestral", "num_steps": 2}
    assert config.guidance.to_dict() == {"name": "none"}
    assert config.discretization.name == "schedule"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys\nsys.exit(0)", r"wrong\.py:2: SystemExit: 0$"),
        ("raise OSError('a\\n b')", r"wrong\.py:1: OSError: a b$"),
        ("x = '\xe9'".encode("latin-1"), r"SyntaxError: \(unicode error\)"),
        (
            "def get_config():\n    return {1: 2}",
            r"get_config\(\) = \{1: 2\} should be a ConfigDict$",
        ),
    ],
)
def test_what_goes_wrong_in_a_file_is_one_line(tmp_path, body, message):
    file = tmp_path / "wrong.py"
    file.write_bytes(body if isinstance(body, bytes) else body.encode())
    with pytest.raises(ConfigError, match=message):
        load(str(file))


def test_a_section_may_be_set_to_none():
    assert load_config(f"{MNIST}:tiny", ["--config.hooks.images=None"]).hooks.images is None
    config = load_config(f"{MNIST}:tiny", {"conditioning.embedders": None})
    assert config.conditioning.embedders is None and config.conditioning.key == "adm"


def test_a_value_that_is_required_is_given_by_an_override(tmp_path):
    file = tmp_path / "open.py"
    file.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        "    required = ml_collections.config_dict.required_placeholder(int)\n"
        "    return ml_collections.ConfigDict({'a': required})\n"
    )
    with pytest.raises(
        ConfigError, match=r"open\.py: .*; set it with --config\.section\.key=value"
    ):
        load_config(str(file))
    assert load_config(str(file), ["--config.a=3"]).a == 3
