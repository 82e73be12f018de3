"""Which engine runs a module, for functions that scripts call without an `Accelerator`."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from zeroaccel.engine.masters import Share

_engines: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def remember(engine: Any, backend: Any) -> None:
    """Notes that a backend has made an engine of `engine.module`."""
    _engines[engine.module] = weakref.ref(engine), weakref.ref(backend)


def share_of(module: torch.nn.Module) -> Share | None:
    """What this rank holds of the module's engine; None where no engine runs it."""
    engine, backend = (found() for found in _engines.get(module, (lambda: None, lambda: None)))
    return None if engine is None or backend is None else backend.share(engine)
