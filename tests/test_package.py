"""The installed package: its version, its type marker, and the name by which it was called."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_jax
from diffusion_jax.cli import main

ROOT = Path(__file__).parents[1]
# sys.argv[0] -> the program that usage and examples name.
CALLED = {
    "/somewhere/launch.py": "python launch.py",
    "/site/diffusion_jax/__main__.py": "python -m diffusion_jax",
    "/usr/bin/diffusion-jax": "diffusion-jax",
}


@pytest.mark.parametrize("called", CALLED)
def test_usage_and_examples_name_the_program_as_it_was_called(called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called, "--help"])
    with pytest.raises(SystemExit):
        main()
    text, name = capsys.readouterr().out, CALLED[called]
    assert text.startswith(f"usage: {name} ")
    assert f"  {name} sample --workdir=" in text
    assert not any(other in text for other in {*CALLED.values()} - {name, "diffusion-jax"})


def test_the_module_is_a_program():
    command = [sys.executable, "-m", "diffusion_jax", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0
    assert result.stdout == f"diffusion-jax {diffusion_jax.__version__}\n"


def test_the_version_is_that_of_the_changelog_and_of_the_citation():
    version = re.escape(diffusion_jax.__version__)
    assert re.search(rf"^## \[{version}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_type_checkers_read_the_annotations():
    assert (Path(diffusion_jax.__file__).parent / "py.typed").exists()


def test_no_message_names_a_package_index_entry_that_is_not_there():
    # `pip install diffusion-jax[...]` would look for this project on an index, where it is not.
    advice = re.compile(r"pip install[^\n]*diffusion[-_]jax\[")
    files = [*ROOT.glob("diffusion_jax/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    assert not [file for file in files if advice.search(file.read_text())]


def test_pre_commit_runs_the_pinned_ruff():
    (pinned,) = re.findall(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(rf"ruff-pre-commit\n\s+rev: v{re.escape(pinned)}\n", hooks)


@pytest.mark.slow
def test_the_wheel_works_without_a_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="is in the extra docs")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    build = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    install = ["install", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [site / "bin" / "diffusion-jax", "--config=mnist:tiny", "--workdir=run"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert result.returncode == 0, result.stderr
    assert "draw images: diffusion-jax sample --workdir=run" in result.stdout
    assert str(site) in call_from(elsewhere, site, "import diffusion_jax; print(diffusion_jax)")


def call_from(folder: Path, site: Path, code: str) -> str:
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env).stdout
