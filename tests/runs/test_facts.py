"""facts.json tells each start of a run: when, on what, from which file and what differs from it."""

import pytest
from support.reports import TINY, logged

from diffusion_jax.experiment.config.files import load_config_beside_file
from diffusion_jax.runs.facts import (
    FACTS,
    file_differences,
    hardware,
    read_facts,
    record_start,
    starts_of,
)

MADE = {
    "revision": "abc",
    "code": "123",
    "packages": {"jax": "1"},
    "data": {"train": {"name": "d", "num_examples": 3, "digest": "e", "class_names": ["a"] * 1000}},
    "config": {},
}


def test_each_start_is_added(workdir):
    config, file = load_config_beside_file(TINY, ["--config.seed=5"])
    logged(workdir, [])
    record_start(workdir, MADE, config, step=0, config_file=file)
    record_start(workdir, MADE, config, step=4)
    first, second = starts_of(read_facts(workdir))
    assert (first["step"], second["step"]) == (0, 4) and first["time"] <= second["time"]
    assert first["data"] == {"train": {"name": "d", "num_examples": 3, "digest": "e"}}
    assert first["config_file"] == TINY and "config_file" not in second
    assert first["differs"] == [{"path": "seed", "file": "0", "run": "5"}]
    assert first["hardware"] == hardware() and hardware()["devices"] == 8


@pytest.mark.parametrize(
    "content", [b"\xff", b"3", b'{"starts": 3}', b'{"starts": [3, {"time": "x"}]}']
)
def test_what_is_damaged_is_left_out(workdir, content):
    workdir.mkdir()
    assert starts_of(read_facts(workdir)) == []
    (workdir / FACTS).write_bytes(content)
    assert starts_of(read_facts(workdir)) == []


def test_a_file_that_needs_values_has_no_differences(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        "def get_config():\n"
        "    needed = config_dict.required_placeholder(int)\n"
        "    return config_dict.ConfigDict({'seed': needed})\n"
    )
    config, file = load_config_beside_file(str(path), ["--config.seed=3"])
    assert config.seed == 3 and file_differences(file, config) is None
