"""Modules that import what they re-export at first use, so that `import zeroaccel` loads no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def reexport(
    module: str, sources: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` for a module that re-exports names.

    Args:
        module: the re-exporting module's name.
        sources: for each source module the names taken from it.
        submodules: modules of the package that an attribute imports, so that `import a` is enough for `a.b.name`.
    """
    origins = {name: source for source, names in sources.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{module}.{name}")
        if name not in origins:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origins[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return __getattr__, sorted(origins)
