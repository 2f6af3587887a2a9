"""The soak script in short: three kills of models of images and videos, and of a first stage."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SCRIPT = pathlib.Path(__file__).with_name("kill_and_resume.py")
ROOT = SCRIPT.parents[2]
QUICK = ("--config.hooks.images.batch_frequency=1000", "--config.hooks.validation.every=25")


@pytest.mark.parametrize("config", ["mnist", "emoji_vae", "moving_digits"])
def test_killed_three_times_and_nothing_is_lost(tmp_path, config):
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            f"--config=configs/{config}.py:tiny",
            "--kills=3",
            "--every=5",
            "--num_steps=60",
            f"--workdir={tmp_path}",
            *QUICK,
        ],
        env=os.environ
        | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 SIGKILL, [123] of them during a save; 0 differences", done.stdout)
