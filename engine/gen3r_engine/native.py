"""The C++ extension `gen3r_engine._C`: whether it is there, and if not, why.

Every function of it has an equivalent in Python with the same results, which its callers take where
`native()` is None. `gen3r-engine doctor` and run.json say which it was.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

API = 1
"""What this version's Python code expects of the extension; as API in csrc/module.cpp."""

_BUILD = "python setup.py build_ext --inplace (needs a C++17 compiler and pybind11)"


def native() -> ModuleType | None:
    """The extension, or None where it was not built or does not load."""
    return _load()[0]


def why_missing() -> str:
    """Why `native()` is None, with the mend; empty where the extension is there."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("gen3r_engine._C")
    except ModuleNotFoundError:
        return None, f"not built; build it with {_BUILD}"
    except ImportError as error:  # another Python's, or a library that it links is not there
        return None, f"does not load ({error}); build it anew with {_BUILD}"
    found = getattr(module, "API", None)
    if found != API:
        return None, f"built from other sources (API {found}, not {API}); build it anew: {_BUILD}"
    return module, ""
