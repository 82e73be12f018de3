"""Prepared loaders: they shard, move batches to the device, and know their last batch before they yield it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch.utils.data import BatchSampler, DataLoader

from zeroaccel.distributed.nested import (
    concatenate,
    find_batch_size,
    get_data_structure,
    initialize_tensors,
    send_to_device,
    slice_tensors,
)
from zeroaccel.distributed.operations import broadcast, broadcast_object_list
from zeroaccel.distributed.random import synchronize_rng_states
from zeroaccel.errors import ConfigError
from zeroaccel.state import GradientState, PartialState

END = object()


class DataLoaderStateMixin:
    """What a loader publishes to the `GradientState` while it is iterated.

    Attributes:
        end_of_dataloader: whether the current batch is the last.
        remainder: real samples in the last global batch, 0 if it is full, -1 if nothing can be said.
        iteration: number of the epoch.
    """

    end_of_dataloader = False
    remainder = -1
    iteration = 0
    gradient_state: GradientState
    _drop_last = False

    def reset(self) -> None:
        """Back to the state before an epoch."""
        self.end_of_dataloader = False
        self.remainder = -1

    def begin(self) -> None:
        """An epoch begins."""
        self.reset()
        if not self._drop_last:
            with contextlib.suppress(TypeError):  # no length, or no batch size: remainder stays unknown
                self.remainder = self.total_dataset_length % self.total_batch_size
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """An epoch is over, or was left."""
        self.gradient_state._remove_dataloader(self)

    @property
    def total_batch_size(self) -> int:
        """Samples of all ranks in a batch."""
        raise NotImplementedError

    @property
    def total_dataset_length(self) -> int:
        """Samples of all ranks in an epoch."""
        raise NotImplementedError

    def _publish(self, batches: Iterator[tuple[Any, bool]]) -> Iterator[Any]:
        """Yields batches that come with "is the last"."""
        self.begin()
        try:
            for batch, last in batches:
                self.end_of_dataloader = last
                self.gradient_state._batch_drawn()
                yield batch
            self.iteration += 1
            self.gradient_state._epoch_ended()
        finally:
            self.end()


class _Prepared(DataLoaderStateMixin, DataLoader[Any]):
    """A `DataLoader` that was made from another one."""

    def set_epoch(self, epoch: int) -> None:
        """Tells samplers and dataset which epoch comes."""
        self.iteration = epoch
        for holder in samplers_of(self):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def get_sampler(self) -> Any:
        """The sampler of single indices."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Replaces the sampler of single indices."""
        holder = self.sampler if isinstance(self.sampler, BatchSampler) else self.batch_sampler
        while (inner := getattr(holder, "batch_sampler", None)) is not None:
            holder = inner
        holder.sampler = sampler  # type: ignore[union-attr]

    @property
    def total_dataset_length(self) -> int:
        """Samples of all ranks in an epoch."""
        dataset: Any = self.dataset
        if hasattr(dataset, "total_length"):
            return int(dataset.total_length)
        return len(getattr(dataset, "dataset", dataset) if _is_shard(dataset) else dataset)


def _is_shard(dataset: Any) -> bool:
    return hasattr(dataset, "num_processes") and hasattr(dataset, "process_index")


def samplers_of(loader: Any) -> list[Any]:
    """Batch sampler and samplers of a loader, from the outside in."""
    found, holder = [], loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while holder is not None:
        found.append(holder)
        holder = holder.__dict__.get("batch_sampler", holder.__dict__.get("sampler"))
    return found


def get_sampler(dataloader: Any) -> Any:
    """The sampler of single indices of any loader, None where it has none."""
    found = samplers_of(dataloader)
    return found[-1] if len(found) > 1 else None


class DataLoaderShard(_Prepared):
    """The batches of one rank.

    Args:
        dataset: the dataset, or its shard.
        device: where batches go; None leaves them.
        rng_types, synchronized_generator: generators to synchronize before each epoch.
        skip_batches: batches to leave out at the beginning, for iterable datasets.
        kwargs: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: list[Any] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.iteration = iteration

    def __iter__(self) -> Any:
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.set_epoch(self.iteration)
        yield from self._publish(self._batches(super().__iter__()))

    def _batches(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        for _ in range(self.skip_batches):
            next(source, END)
        current = next(source, END)
        while current is not END:
            # Moved before the next one is fetched, so that copy and fetch overlap.
            if self.device is not None:
                current = send_to_device(current, self.device, non_blocking=self._non_blocking)
            following = next(source, END)
            yield current, following is END
            current = following

    @property
    def total_batch_size(self) -> int:
        """Samples of all ranks in a batch."""
        sampler: Any = self.sampler if isinstance(self.sampler, BatchSampler) else self.batch_sampler
        holder = sampler if sampler is not None else self.dataset
        size: Any = getattr(holder, "batch_size", None)
        if size is None and sampler is None:
            size = self.batch_size
        if getattr(holder, "split_batches", False):
            return int(size)
        return int(size * getattr(holder, "num_processes", 1))


class DataLoaderDispatcher(_Prepared):
    """Rank 0 reads, the others receive their part of each global batch.

    Args:
        dataset: read on rank 0 only.
        split_batches: one batch of the loader is cut for the ranks; else as many batches as ranks are joined first.
        skip_batches: global batches to leave out at the beginning.
        slice_fn: cuts a batch: `slice_fn(batch, slice, process_index=..., num_processes=...)`.
        kwargs: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.split_batches = split_batches
        self.skip_batches = skip_batches
        self.slice_fn = slice_fn or slice_tensors
        self.gradient_state = GradientState()
        self.state = PartialState()
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.iteration = iteration

    def __iter__(self) -> Any:
        self.set_epoch(self.iteration)
        source = self._global_batches(super().__iter__()) if self.state.process_index == 0 else None
        yield from self._publish(self._shares(source))

    def _global_batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """On rank 0: what all ranks get together."""
        count = 1 if self.split_batches else self.state.num_processes
        while True:
            parts = [part for part in (next(source, END) for _ in range(count)) if part is not END]
            if not parts or (self._drop_last and len(parts) < count):
                return
            yield self._joined(parts)

    def _joined(self, parts: list[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        try:
            return concatenate(parts)
        except RuntimeError as error:
            raise ConfigError(
                "dispatch_batches joins the batches of all ranks, and these have different shapes: pad them"
                f" (a collate_fn), or use dispatch_batches=False or split_batches=True. PyTorch said: {error}"
            ) from error

    def _shares(self, source: Iterator[Any] | None) -> Iterator[tuple[Any, bool]]:
        first = None
        number = 0
        current = self._next(source)
        while True:
            batch, ended = self._share_out(current)
            if ended:
                return
            following = self._next(source)
            last = self._agree(following is END)
            if first is None:
                first = self.slice_fn(
                    batch,
                    slice(0, self.state.num_processes),
                    process_index=self.state.process_index,
                    num_processes=self.state.num_processes,
                )
            if number >= self.skip_batches:
                yield self._own(batch, first, last), last
            number += 1
            if last:
                return
            current = following

    @staticmethod
    def _next(source: Iterator[Any] | None) -> Any:
        return None if source is None else next(source, END)

    def _agree(self, ended: bool) -> bool:
        return bool(broadcast_object_list([ended])[0])

    def _share_out(self, current: Any) -> tuple[Any, bool]:
        """Rank 0's batch on every rank."""
        rank0 = self.state.process_index == 0
        info = [
            None if rank0 and current is END else get_data_structure(current) if rank0 else None,
            current is END,
        ]
        structure, ended = broadcast_object_list(info)
        if ended:
            return None, True
        batch = current if rank0 else initialize_tensors(structure)
        batch = send_to_device(batch, self.state.device, non_blocking=self._non_blocking)
        return broadcast(batch, from_process=0), False

    def _own(self, batch: Any, first: Any, last: bool) -> Any:
        processes, rank = self.state.num_processes, self.state.process_index
        observed = find_batch_size(batch) or 0
        share, rest = divmod(observed, processes)
        if rest and not self._drop_last:
            batch, share = concatenate([batch, first]), share + 1
        if last:
            self.remainder = observed
        return self.slice_fn(
            batch, slice(rank * share, (rank + 1) * share), process_index=rank, num_processes=processes
        )

    def __len__(self) -> int:
        whole = super().__len__()
        if self.split_batches:
            return whole
        parts = whole / self.state.num_processes
        return math.floor(parts) if self._drop_last else math.ceil(parts)

    @property
    def total_batch_size(self) -> int:
        """Samples of all ranks in a batch."""
        size = self.batch_size if self.batch_size is not None else getattr(self.batch_sampler, "batch_size", None)
        return size if self.split_batches else size * self.state.num_processes  # type: ignore[operator,return-value]


class SkipDataLoader(_Prepared):
    """A loader without its first batches, for datasets that must be read to be skipped."""

    def __init__(self, dataset: Any, skip_batches: int = 0, iteration: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self.iteration = iteration

    def __iter__(self) -> Any:
        source = super().__iter__()
        for _ in range(self.skip_batches):
            next(source, END)
        yield from self._publish(self._looked_ahead(source))

    @staticmethod
    def _looked_ahead(source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        current = next(source, END)
        while current is not END:
            following = next(source, END)
            yield current, following is END
            current = following

    def __len__(self) -> int:
        return super().__len__() - self.skip_batches

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch."""
        return self.batch_size  # type: ignore[return-value]
