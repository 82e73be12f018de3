"""Reads from PyTorch's objects what `config/auto.py` needs to fill the `auto` fields."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from zeroaccel.config.facts import LoaderFact, ModelFact, OptimizerFact, SchedulerFact
from zeroaccel.data_loader.parts import get_sampler
from zeroaccel.engine.optimizer import DummyOptim
from zeroaccel.engine.scheduler import DummyScheduler


def loader_facts(loaders: list[DataLoader[Any]]) -> tuple[LoaderFact, ...]:
    """Batch sizes. Shuffled loaders are for training; where none is shuffled, the first one."""
    shuffled = [_is_shuffled(loader) for loader in loaders]
    if not any(shuffled):
        shuffled = [position == 0 for position in range(len(loaders))]
    return tuple(
        LoaderFact(batch_size=_batch_size(loader), training=training)
        for loader, training in zip(loaders, shuffled, strict=True)
    )


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    # A stream does not say; a sampler of the user's own is taken to shuffle.
    return not isinstance(loader.dataset, IterableDataset) and not isinstance(get_sampler(loader), SequentialSampler)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    size = loader.batch_size
    if size is None:  # a batch sampler of the user's own, or given as `sampler`
        holder = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        size = getattr(holder, "batch_size", None)
    return size if isinstance(size, int) else None


def model_fact(model: torch.nn.Module) -> ModelFact:
    """Size of the model; parameters that stage 3 has partitioned already count in full."""
    sizes = [int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    hidden_size, origin = _hidden_size(getattr(model, "config", None))
    return ModelFact(
        numel=sum(sizes),
        largest_parameter=max(sizes, default=0),
        hidden_size=hidden_size,
        hidden_size_origin=origin,
    )


def _hidden_size(config: Any, path: str = "model.config") -> tuple[int | None, str]:
    if isinstance(size := getattr(config, "hidden_size", None), int):
        return size, f"{path}.hidden_size"
    sizes = getattr(config, "hidden_sizes", None)
    if isinstance(sizes, (list, tuple)) and sizes:
        return max(sizes), f"largest of {path}.hidden_sizes"
    nested = getattr(config, "text_config", None)
    return _hidden_size(nested, f"{path}.text_config") if nested is not None else (None, "parameter shapes")


def optimizer_fact(optimizer: Any) -> OptimizerFact:
    """Values of a dummy, or just the name of a real optimizer."""
    if not isinstance(optimizer, DummyOptim):
        return OptimizerFact(dummy=False, name=type(optimizer).__name__, params={})
    params = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, **optimizer.kwargs}
    return OptimizerFact(dummy=True, name="DummyOptim", params=params)


def scheduler_fact(scheduler: Any) -> SchedulerFact:
    """Values of a dummy, or just the name of a real scheduler."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, DummyScheduler):
        return SchedulerFact(
            dummy=False,
            has_callable=False,
            name=name,
            total_num_steps=None,
            warmup_num_steps=0,
            max_lr=None,
            params={},
        )
    optimizer = scheduler.optimizer
    defaults = getattr(optimizer, "defaults", None)
    return SchedulerFact(
        dummy=True,
        has_callable=scheduler.lr_scheduler_callable is not None,
        name=name,
        total_num_steps=scheduler.total_num_steps,
        warmup_num_steps=scheduler.warmup_num_steps,
        max_lr=defaults["lr"] if defaults is not None else getattr(optimizer, "lr", None),
        params=scheduler.kwargs,
    )
