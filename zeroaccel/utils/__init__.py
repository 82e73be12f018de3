"""Everything that `accelerate.utils` has for DeepSpeed, loaded at first use."""

from __future__ import annotations

import importlib

from zeroaccel import refused
from zeroaccel.lazy import reexport

# At once: importing the module `zeroaccel.utils.tqdm` later would put it in the place of the function.
from zeroaccel.utils.tqdm import tqdm as tqdm

_MODULES = [
    importlib.import_module(f"{__name__}.{name}")
    for name in (
        "constants",
        "dataclasses",
        "deepspeed",
        "environment",
        "imports",
        "launch",
        "memory",
        "modeling",
        "operations",
        "other",
        "random",
        "versions",
    )
]

__getattr__, __all__ = reexport(
    __name__, {refused.__name__: refused.NAMES} | {module.__name__: module.__all__ for module in _MODULES}
)
__all__ += ["tqdm"]
