"""What a `DataLoader` is made of: to look at it, and to make another one like it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

# What a prepared loader takes over as it is; how indices come together is decided in prepare.py.
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def kept_options(dataloader: DataLoader[Any]) -> dict[str, Any]:
    """Keyword arguments that give another loader the same workers, collation and memory."""
    return {name: getattr(dataloader, name) for name in _KEPT if hasattr(dataloader, name)}


def source_options(dataloader: DataLoader[Any], sampler: Any) -> dict[str, Any]:
    """Keyword arguments to get batches as `dataloader` does, a map-style one with `sampler` as its outermost."""
    if isinstance(dataloader.dataset, IterableDataset):
        return {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
    if outer_sampler(dataloader) is dataloader.batch_sampler:
        return {"batch_sampler": sampler}
    return {"sampler": sampler, "batch_size": dataloader.batch_size}


def outer_sampler(loader: Any) -> Any:
    """What a map-style loader draws from: its batch sampler, or with `batch_size=None` its sampler."""
    if isinstance(loader.sampler, BatchSampler) or loader.batch_sampler is None:
        return loader.sampler
    return loader.batch_sampler


def samplers_of(loader: Any) -> list[Any]:
    """Batch sampler and samplers of a loader, from the outside in."""
    found, holder = [], outer_sampler(loader)
    while holder is not None:
        found.append(holder)
        inside = getattr(holder, "__dict__", {})  # a list of indices has none
        holder = inside.get("batch_sampler", inside.get("sampler"))
    return found


def get_sampler(dataloader: Any) -> Any:
    """The sampler of single indices of any loader, None where it has none."""
    innermost = samplers_of(dataloader)[-1]
    return None if innermost is dataloader.batch_sampler else innermost


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader, its samplers and its dataset draw from, always in the same order."""
    dataset = loader.dataset
    holders = [loader, *samplers_of(loader), dataset, getattr(dataset, "dataset", None)]
    found = {
        id(one): one for holder in holders if isinstance(one := getattr(holder, "generator", None), torch.Generator)
    }
    return list(found.values())
