"""Which objects a config may name as "package.module:Object": those that the user wrote.

A config may come with somebody else's run, and it chooses the object's arguments too. So it must
not be able to call subprocess.run, or anything else that is installed everywhere.
"""

import importlib.metadata
import importlib.util
import re
import sys
import types
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]
_INSTALLED = {"site-packages", "dist-packages"}
# What has a home: its __module__ is where it was defined, not where it was imported.
_DEFINED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def is_users_module(name: str) -> bool:
    """Tell whether a module is the user's own, without importing it.

    It is not when it belongs to Python, to this package or to an installed package, unless that
    package requires this one, as a package of somebody's own parts does. True for a module that
    does not exist.
    """
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top == _PACKAGE:
        return top == "__main__"  # a notebook, or the script that runs
    module = sys.modules.get(top)
    if module is not None and getattr(module, "__spec__", None) is None:
        return True  # find_spec would raise; such a module was made by hand
    spec = importlib.util.find_spec(top)
    if spec is None:
        return True
    places = [spec.origin] if spec.has_location else (spec.submodule_search_locations or ())
    if not any(_INSTALLED & set(Path(place or "").parts) for place in places):
        return True
    names = importlib.metadata.packages_distributions().get(top, ())
    required = [line for name in names for line in importlib.metadata.requires(name) or ()]
    return any(re.match(r"diffusion[-_.]jax\b", line, re.IGNORECASE) for line in required)


def is_defined_in(found: object, module: str) -> bool:
    """Tell whether a function or class was written in a module's package, not imported into it.

    Other objects, such as a functools.partial, were made where they are found.
    """
    home = getattr(found, "__module__", None) or ""
    return not isinstance(found, _DEFINED) or home.partition(".")[0] == module.partition(".")[0]
