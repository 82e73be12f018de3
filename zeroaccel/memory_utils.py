"""The older place of `zeroaccel.utils.memory`."""

from __future__ import annotations

from zeroaccel.lazy import reexport
from zeroaccel.utils import memory

__getattr__, __all__ = reexport(__name__, {memory.__name__: memory.__all__})
