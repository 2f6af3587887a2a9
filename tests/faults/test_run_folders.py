"""Folders of runs whose config.json or metrics.jsonl is damaged, or that are none."""

import os

from faults.frame import BadInput, bad_inputs

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.folder import load_saved_config
from diffusion_jax.runs.report.gathering import gather

WHOLE = '{"config": {"seed": 0}}'
BROKEN = "is empty, cut or no JSON"
CONFIGS = {
    "nothing": ("", BROKEN),
    "half an object": ('{"config": {"seed"', BROKEN),
    "latin-1": ('{"config": {"a": "é"}}'.encode("latin-1"), BROKEN),
    "bytes of any kind": (bytes(range(256)), BROKEN),
    "50,000 sections": ('{"config": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001, BROKEN),
    "an integer of 5,000 digits": ('{"config": {"a": ' + "9" * 5000 + "}}", BROKEN),
    "a list": ("[]", "holds list and should hold an object"),
    "null": ("null", "holds NoneType and should hold an object"),
    "no config": ('{"about": "x"}', "holds about and should hold config"),
    "a list for a config": ('{"config": [1]}', "should be"),
    "a text for a config": ('{"config": "x"}', "should be"),
    "null for a config": ('{"config": null}', "should be"),
    "a reference to nothing": ('{"config": {"a": {"$same": "b"}}}', "config"),
    "references in circles": (
        '{"config": {"a": {"$same": "b"}, "b": {"$same": "a"}}}', "config",
    ),
    "an unknown tag": ('{"config": {"a": {"$x": 1}}}', r"\$x is unknown"),
    "an unknown operation": ('{"config": {"a": {"$of": 1, "$ops": [["exec", 2]]}}}', "config"),
    "a huge power": ('{"config": {"a": {"$of": 9, "$ops": [["pow", 999999999]]}}}', "config"),
    "operations in words": ('{"config": {"a": {"$of": 1, "$ops": "x"}}}', "config"),
    "a key with a dot": ('{"config": {"a.b": 1}}', "config"),
}  # fmt: skip
METRICS = {
    "nothing": (b"", "is empty: the run has not logged a step yet"),
    "half a line": (b'{"step": 1, "tr', "is empty: the run has not logged"),
    "bytes of any kind": (bytes(range(256)), "is empty: the run has not logged"),
    "numbers": (b"1\n2\n", "is empty: the run has not logged"),
    "steps in words": (b'{"step": "x"}\n', "is empty: the run has not logged"),
    "an endless step": (b'{"step": Infinity}\n', "is empty: the run has not logged"),
}


def config(name, text, says):
    def act(folder):
        path = folder / "config.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        load_saved_config(folder)

    return BadInput(f"config.json: {name}", act, says)


def metrics(name, content, says):
    def act(folder):
        (folder / "config.json").write_text(WHOLE)
        (folder / "metrics.jsonl").write_bytes(content)
        gather(folder)

    return BadInput(f"metrics.jsonl: {name}", act, says)


def no_run(name, act, says):
    return BadInput(f"no run: {name}", act, says)


test_run_folders = bad_inputs(
    [
        *(config(name, *row) for name, row in CONFIGS.items()),
        *(metrics(name, *row) for name, row in METRICS.items()),
        no_run("an empty folder", load_saved_config, "is not the folder of a run"),
        no_run("no metrics", lambda f: [(f / "config.json").write_text(WHOLE), gather(f)],
               "has no metrics yet"),
        no_run("a file", lambda _: gather("/etc/passwd"), "is not the folder of a run"),
        no_run("a zero byte", lambda _: gather("a\0b"), "is not the folder of a run"),
        no_run("a pipe for config.json", lambda f: [os.mkfifo(f / "c.json"),
               load_config(str(f / "c.json"))], "does not exist"),
    ]
)  # fmt: skip
