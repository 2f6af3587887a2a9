"""Config files that are broken, and what `--config` and its overrides may be written like."""

import os
import re

from faults.frame import BadInput, bad_inputs, launch

from diffusion_jax import load_config

HEAD = "import ml_collections, sys\n"
FILES = {
    "a bracket without end": ("x = (", r"c\.py:1: SyntaxError: '\(' was never closed"),
    "a line moved in": ("def get_config():\nreturn 1", r"c\.py:2: IndentationError"),
    "a word without a value": ("\nx = nothing", r"c\.py:2: NameError: name 'nothing'"),
    "a module that is not there": ("import no_such_module", r"c\.py:1: ModuleNotFoundError"),
    "an error in get_config": ("def get_config():\n    return 1 / 0", r":2: ZeroDivisionError"),
    "an error without words": ("def get_config():\n    raise ValueError", r"c\.py:2: *"),
    "an error of three lines": ("raise OSError('a\\n b\\nc')", "c.py:1: OSError: a b c"),
    "an error of 10,000 letters": ("raise OSError('a' * 10000)", "aaa .*|aaa"),
    "an assertion": ("def get_config():\n    assert 1 > 2, 'odd'", ":2: AssertionError: odd"),
    "sys.exit(0)": (HEAD + "sys.exit(0)", r"c\.py:2: SystemExit: 0"),
    "sys.exit in get_config": (HEAD + "def get_config():\n    sys.exit()", ":3: SystemExit"),
    "sys.exit with words": (HEAD + "sys.exit('no')", ":2: SystemExit: no"),
    "a function without end": ("def get_config():\n    return get_config()", ":2: RecursionError"),
    "nothing": ("", "has no attribute 'get_config'"),
    "another name": ("def get_conf():\n    pass", "has no attribute 'get_config'"),
    "a number called get_config": ("get_config = 3", "TypeError: 'int' object is not callable"),
    "two arguments": ("def get_config(a, b):\n    pass", "missing 2 required positional"),
    "get_config returns None": ("def get_config():\n    pass", r"get_config\(\) = None should be"),
    "get_config returns a dict": ("def get_config():\n    return {1: 2}", "should be a ConfigDict"),
    "get_config returns a list": ("def get_config():\n    return [1]", r"= \[1\] should be a Conf"),
    "get_config returns a text": ("def get_config():\n    return 'x'", "= 'x' should be a Conf"),
    "get_config returns a type": (
        HEAD + "def get_config():\n    return ml_collections.ConfigDict", "should be a ConfigDict",
    ),
    "a value that was not filled in": (
        HEAD + "def get_config():\n    d = ml_collections.ConfigDict()\n"
        "    d.a = ml_collections.config_dict.required_placeholder(int)\n    return d",
        r"c\.py: .*; set it with --config",
    ),
    "latin-1": ("x = 'caf\xe9'".encode("latin-1"), r"SyntaxError: \(unicode error\)"),
    "UTF-16": ("x = 1".encode("utf-16"), "SyntaxError"),
    "a zero byte": (b"x = 1\0", "SyntaxError: source code string cannot contain null bytes"),
    "bytes of any kind": (bytes(range(256)), "SyntaxError"),
    "YAML": ("model:\n  base_learning_rate: 1.0e-4\n", r"c\.py:1: SyntaxError"),
    "JSON": ('{"model": true}', r"c\.py:1: NameError: name 'true'"),
}  # fmt: skip
WORDS = {
    "a file that is not there": ("{folder}/n.py", "n.py does not exist"),
    "a folder": ("{folder}", "is a folder"),
    "no name": ("", "the config file .* (does not exist|is a folder)"),
    "a name mistyped": ("mnits", "did you mean 'mnist'"),
    "a variant mistyped": ("mnist:tyni", "variant 'tyni' is unknown; choose from consistency, "),
    "a variant of a file without any": ("{folder}/plain.py:x", "takes 0 positional arguments"),
    "a pipe": ("{folder}/pipe.py", "pipe.py does not exist"),
    "a dead link": ("{folder}/dead.py", "dead.py does not exist"),
    "a zero byte": ("a\0b.py", "does not exist"),
    "a home that is not there": ("~nobody-at-all/x.py", "does not exist"),
}
OVERRIDES = {
    "without a value": ("--config.train", r"--config\.train should be --config\.section\.key=val"),
    "without a key": ("--config.=3", "should be --config.section.key=value"),
    "an empty section": ("--config.train..num_steps=3", "should be --config.section.key=value"),
    "a key of a value": ("--config.seed.x=1", "'seed' is a value and has no keys"),
    "a number for a section": ("--config.train=3", "config.train = 3 should be a dict of keys"),
    "a word for a number": ("--config.train.num_steps=many", "num_steps = 'many' should be int"),
    "a fraction for an integer": ("--config.train.num_steps=2.5", "num_steps = 2.5 should be int"),
    "nothing for a number": ("--config.train.num_steps=", "num_steps = '' should be int"),
    "a number for a flag": ("--config.model.conv_resample=3", "conv_resample = 3 should be bool"),
    "a key to delete that is not there": ("--config.train.nm=delete", "nm is not there to be"),
}


def file(name, content, says):
    def act(folder):
        path = folder / "c.py"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        load_config(str(path))

    return BadInput(f"a config file: {name}", act, says)


def word(name, text, says):
    def act(folder):
        os.mkfifo(folder / "pipe.py")
        (folder / "dead.py").symlink_to("/nowhere.py")
        (folder / "plain.py").write_text("def get_config():\n    return 3\n")
        load_config(text.format(folder=folder))

    return BadInput(f"--config: {name}", act, says)


def override(name, text, says):
    return BadInput(f"an override: {name}", lambda _: load_config("mnist:tiny", [text]), says)


test_config_files = bad_inputs(
    [
        *(file(name, content, says) for name, (content, says) in FILES.items()),
        *(word(name, text, says) for name, (text, says) in WORDS.items()),
        *(override(name, text, says) for name, (text, says) in OVERRIDES.items()),
    ]
)


def exits(folder):
    path = folder / "c.py"
    path.write_text("import sys\nsys.exit(0)\n")
    launch(f"--config={path}", f"--workdir={folder / 'run'}")


test_a_config_that_exits_is_an_error = bad_inputs(
    [
        BadInput(
            "train with a config that exits", exits, rf"^error: .*{re.escape('c.py:2: SystemE')}"
        )
    ]
)
