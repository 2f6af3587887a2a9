"""Weights that ship inside packages: their files, which are read and never imported or run."""

import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def packaged_file(package: str, file: str, what: str, install: str) -> Path:
    """Find a file of an installed package without importing the package.

    what: what the file is, for the message. install: arguments of pip install.
    Raises FileNotFoundError, with the command to run, where the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{what} are not installed: name their file, or `pip install {install}`"
        )
    return Path(spec.submodule_search_locations[0]) / file


def read_arrays(path: Path) -> Any:
    """Read a pickle of NumPy arrays; nothing else in it is loaded or run.

    Raises ValueError where the file holds anything else or is damaged.
    """
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a pickle of NumPy arrays alone: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows NumPy's arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # Its module was renamed in NumPy 2.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
