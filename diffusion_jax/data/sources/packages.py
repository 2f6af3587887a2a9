"""Find the folder of an optional package without importing it."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path


def require_packages(data_set: str, packages: Mapping[str, str]) -> list[Path]:
    """Find the folders of the packages that a data set is made from.

    Args:
        data_set: its name, for the message.
        packages: import name -> name to install.

    Raises:
        ModuleNotFoundError: some are missing; names them and how to install them.
    """
    folders, missing = [], []
    for name, install_name in packages.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            missing.append(install_name)
        else:
            folders.append(Path(spec.origin).parent)
    if missing:
        raise ModuleNotFoundError(
            f"preparing the data set {data_set!r} needs {', '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    return folders
