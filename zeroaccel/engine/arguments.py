"""Sorts what a script passes to `prepare()`."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from zeroaccel.engine.optimizer import AcceleratedOptimizer, DummyOptim
from zeroaccel.engine.scheduler import AcceleratedScheduler, DummyScheduler
from zeroaccel.errors import ConfigError
from zeroaccel.logging import library_logger

logger = library_logger(__name__)

# Where DeepSpeed's own schedulers live, which share no base class.
DEEPSPEED_SCHEDULERS = "deepspeed.runtime.lr_schedules"


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
    if isinstance(value, (LRScheduler, DummyScheduler)) or is_deepspeed_scheduler(value):
        return Kind.SCHEDULER
    if isinstance(value, DataLoader):
        return Kind.LOADER
    return Kind.OTHER


def is_deepspeed_scheduler(value: Any) -> bool:
    """Whether this is one of DeepSpeed's schedulers, as an object. The plain backend asks too: nothing is imported."""
    return any(base.__module__ == DEEPSPEED_SCHEDULERS for base in type(value).__mro__)


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
    if isinstance(optimizer, DummyOptim):
        optimizer.params = [_readable_twice(group) for group in optimizer.params]
    groups = optimizer.params if isinstance(optimizer, DummyOptim) else optimizer.param_groups
    return [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]


def _readable_twice(group: Any) -> Any:
    """A param group, or a parameter, without generators."""
    if not isinstance(group, dict):
        return group
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, torch.Tensor) else list(params)}


def optimizer_of_each(models: list[torch.nn.Module], optimizers: list[Any]) -> list[Any]:
    """The optimizer that holds a model's parameters, or None, for each model.

    Raises:
        ConfigError: models and optimizers do not belong together one to one.
    """
    found: list[Any] = [None] * len(models)
    for optimizer in optimizers:
        name, held = type(optimizer).__name__, {id(parameter) for parameter in parameters_of(optimizer)}
        owned = [i for i, model in enumerate(models) if any(id(parameter) in held for parameter in model.parameters())]
        if not owned:
            raise ConfigError(
                f"{name} holds no parameter of a model in this prepare() call: DeepSpeed shards both together, so make"
                " the optimizer from model.parameters() and pass both:"
                " model, optimizer = accelerator.prepare(model, optimizer)"
            )
        if len(owned) > 1:
            raise ConfigError(
                f"{name} holds parameters of {len(owned)} models"
                f" ({', '.join(type(models[i]).__name__ for i in owned)}): DeepSpeed shards one optimizer for each"
                " model; make one for each, or put the models into one torch.nn.Module"
            )
        if found[owned[0]] is not None:
            raise ConfigError(
                f"{type(found[owned[0]]).__name__} and {name} both hold parameters of one"
                f" {type(models[owned[0]]).__name__}: DeepSpeed shards one optimizer for each model; use one with"
                " several param groups"
            )
        found[owned[0]] = optimizer
    return found


def drop_idle_groups(optimizer: Any, scheduler: Any, stage: int) -> None:
    """Takes out param groups with nothing to train: DeepSpeed takes out empty ones, and ZeRO fails on frozen ones.

    Raises:
        ConfigError: a scheduler has a learning rate for such a group.
    """
    groups: Any = optimizer.params if isinstance(optimizer, DummyOptim) else optimizer.param_groups
    if not isinstance(groups[0], dict):
        return
    kept = [group for group in groups if _is_used(group, stage)]
    dropped = len(groups) - len(kept)
    if not dropped:
        return
    if scheduler is not None and not isinstance(scheduler, DummyScheduler):
        idle = [str(position) for position, group in enumerate(groups) if not _is_used(group, stage)]
        raise ConfigError(
            f"param group {', '.join(idle)} of {type(optimizer).__name__} has no parameter to train: DeepSpeed drops"
            f" it, and {type(scheduler).__name__} would have a learning rate too many; leave the group out"
        )
    groups[:] = kept
    logger.warning("%d param groups of %s have nothing to train and are left out", dropped, type(optimizer).__name__)


def _is_used(group: dict[str, Any], stage: int) -> bool:
    if stage == 0:
        return bool(group["params"])
    return any(parameter.requires_grad for parameter in group["params"])


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
