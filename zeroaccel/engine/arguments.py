"""Sorts what a script passes to `prepare()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from zeroaccel.engine.optimizer import AcceleratedOptimizer, DummyOptim
from zeroaccel.engine.scheduler import AcceleratedScheduler, DummyScheduler
from zeroaccel.errors import ConfigError

# DeepSpeed's own, which share no base class; a test compares with deepspeed.runtime.lr_schedules.
DEEPSPEED_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


class Kind(Enum):
    """What an argument of `prepare()` is."""

    MODEL = auto()
    OPTIMIZER = auto()
    SCHEDULER = auto()
    LOADER = auto()
    OTHER = auto()  # comes back untouched; already prepared objects too


def kind_of(value: Any) -> Kind:
    """Sorts one argument."""
    if getattr(value, "_is_accelerate_prepared", False):
        return Kind.OTHER
    if isinstance(value, (AcceleratedOptimizer, AcceleratedScheduler)):
        return Kind.OTHER
    if isinstance(value, torch.nn.Module):
        return Kind.MODEL
    if isinstance(value, (torch.optim.Optimizer, DummyOptim)):
        return Kind.OPTIMIZER
    if isinstance(value, (LRScheduler, DummyScheduler)) or type(value).__name__ in DEEPSPEED_SCHEDULERS:
        return Kind.SCHEDULER
    if isinstance(value, DataLoader):
        return Kind.LOADER
    return Kind.OTHER


def distinct(values: Iterable[Any], kind: Kind) -> list[Any]:
    """The arguments of one kind, each object once."""
    found: list[Any] = []
    for value in values:
        if kind_of(value) is kind and not any(value is other for other in found):
            found.append(value)
    return found


def replace(values: Iterable[Any], replacements: dict[int, Any]) -> tuple[Any, ...]:
    """The arguments in the caller's order, with what became of them (by `id`)."""
    return tuple(replacements.get(id(value), value) for value in values)


def mark_prepared(value: Any) -> Any:
    """Notes on the object that a further `prepare()` shall leave it alone."""
    value._is_accelerate_prepared = True
    return value


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer, or a `DummyOptim`, holds."""
    groups = optimizer.params if isinstance(optimizer, DummyOptim) else optimizer.param_groups
    if not isinstance(groups, (list, tuple)):
        # A generator can be read only once.
        groups = optimizer.params = list(groups)
    return [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]


def owned_by(
    model: torch.nn.Module, candidates: list[Any], held: Callable[[Any], list[torch.nn.Parameter]], what: str
) -> Any:
    """The one of `candidates` that holds parameters of `model`, or None.

    Raises:
        ConfigError: several do.
    """
    own = {id(parameter) for parameter in model.parameters()}
    matching = [c for c in candidates if any(id(parameter) in own for parameter in held(c))]
    if len(matching) > 1:
        raise ConfigError(
            f"{len(matching)} {what}s hold parameters of one {type(model).__name__}: DeepSpeed shards one for each"
            f" model; use one {what} with several param groups"
        )
    return matching[0] if matching else None


def refuse_device_map(models: Iterable[torch.nn.Module], distributed: bool) -> None:
    """A model that is spread over devices already cannot be trained in parallel.

    Raises:
        ConfigError: it has a device map with more than one device.
    """
    for model in models if distributed else ():
        for module in model.modules():
            device_map = getattr(module, "hf_device_map", None)
            if device_map is not None and len(device_map) > 1:
                raise ConfigError(
                    f"{type(module).__name__} was loaded with a device map over {len(device_map)} entries, so it cannot"
                    " be trained in parallel: load it without device_map, or run one process without DeepSpeed"
                )
