"""Where an optional package lives, without importing it."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path


def require_packages(data_set: str, packages: Mapping[str, str]) -> list[Path]:
    """Folders of the packages that a data set is made from.

    Args:
        data_set: its name, for the message.
        packages: import name -> name to install.

    Raises:
        ModuleNotFoundError: some are missing; names them and the extra that brings them.
    """
    found = {name: importlib.util.find_spec(name) for name in packages}
    missing = [packages[name] for name, spec in found.items() if spec is None]
    if missing:
        raise ModuleNotFoundError(
            f"preparing the data set {data_set!r} needs {', '.join(missing)}: "
            "pip install 'diffusion-jax[demo]'"
        )
    return [Path(spec.origin).parent for spec in found.values()]
