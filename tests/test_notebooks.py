"""The notebooks: run from the first cell to the last, and are kept without outputs."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Path) -> list[dict]:
    return [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]


@each_notebook
def test_outputs_are_stripped(notebook):
    cells = code_cells(notebook)
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@each_notebook
def test_notebook_runs_and_shows_pictures(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="is in the extra docs")
    import nbformat

    monkeypatch.delenv("XLA_FLAGS")  # one device, fully optimised, as a user has it
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    page = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(
        page,
        timeout=2400,
        kernel_name="python3",
        resources={"metadata": {"path": os.fspath(tmp_path)}},
    )
    client.execute()
    pictures = [
        output
        for cell in page.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in (output.get("data") or {})
    ]
    assert len(pictures) >= 2
