"""Prepared loaders: they shard, move batches to the device, and know their last batch before they yield it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from zeroaccel.data_loader.sharding import IterableDatasetShard
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
from zeroaccel.errors import ConfigError, DistributedError
from zeroaccel.state import GradientState, PartialState

END = object()


@dataclass(frozen=True)
class _Failure:
    """Stands for the batch that rank 0 could not read."""

    problem: Exception

    def __str__(self) -> str:
        return f"{type(self.problem).__name__}: {self.problem}"


class DataLoaderStateMixin:
    """What a loader publishes to the `GradientState` while it is iterated.

    Attributes:
        end_of_dataloader: whether the current batch is the last.
        remainder: real samples in the last global batch, 0 (or its size) if it is full, -1 if nothing can be said.
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
        """Replaces the sampler of single indices.

        Raises:
            ConfigError: a batch sampler decides alone.
        """
        if get_sampler(self) is None:
            raise ConfigError(
                f"{type(outer_sampler(self)).__name__} draws indices without a sampler: replace it as well"
            )
        *_, holder, _ = [self, *samplers_of(self)]
        # A DataLoader refuses an assignment, but reads its sampler anew at each epoch.
        vars(holder)["sampler" if "sampler" in vars(holder) else "batch_sampler"] = sampler

    @property
    def total_dataset_length(self) -> int:
        """Samples of all ranks in an epoch."""
        dataset: Any = self.dataset.dataset if isinstance(self.dataset, IterableDatasetShard) else self.dataset
        return int(dataset.total_length) if hasattr(dataset, "total_length") else len(dataset)


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
        current = next(islice(source, self.skip_batches, None), END)
        while current is not END:
            # Moved before the next one is fetched, so that copy and fetch overlap.
            if self.device is not None:
                current = send_to_device(current, self.device, non_blocking=self._non_blocking)
            following = next(source, END)
            if following is END:
                self._measure_remainder()
            yield current, following is END
            current = following

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    @property
    def _shard(self) -> Any:
        """What gives this rank its part; None where an iterable dataset is read whole."""
        if isinstance(self.dataset, IterableDataset):
            return self.dataset if isinstance(self.dataset, IterableDatasetShard) else None
        return outer_sampler(self)

    def _measure_remainder(self) -> None:
        """The shard counted; the length of the dataset is a guess where a sampler draws fewer samples, or more."""
        counted = getattr(self._shard, "remainder", -1)
        workers_fill = isinstance(self.dataset, IterableDatasetShard) and self.num_workers > 1  # each one its part
        if counted >= 0 or workers_fill:
            self.remainder = counted

    @property
    def total_batch_size(self) -> int:
        """Samples of all ranks in a batch."""
        size: Any = getattr(self._shard, "batch_size", None) or self.batch_size
        split = getattr(self._shard, "split_batches", False)
        return int(size if split else size * getattr(self._shard, "num_processes", 1))


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
        source = self._global_batches(super().__iter__()) if self.state.process_index == 0 else iter(())
        yield from self._publish(self._shares(source))

    def _global_batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """On rank 0: what all ranks get together, or in the end the exception that stops them."""
        count = 1 if self.split_batches else self.state.num_processes
        try:
            for _ in islice(source, self.skip_batches * count):
                pass
            while parts := list(islice(source, count)):
                if self._drop_last and len(parts) < count:
                    return
                yield self._joined(parts)
        except Exception as problem:  # the others must hear of it, they wait for a batch
            yield _Failure(problem)

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

    def _shares(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        first = None
        current = next(source, END)
        last = False
        while not last:
            following = END if isinstance(current, _Failure) else next(source, END)
            batch, last = self._hand_out(current, following)
            if batch is END:
                return
            if first is None:
                first = self._cut(batch, slice(0, self.state.num_processes))
            yield self._own(batch, first, last), last
            current = following

    def _hand_out(self, current: Any, following: Any) -> tuple[Any, bool]:
        """Rank 0's batch on every rank, and whether it is the last; `END` if there is none."""
        reads = self.state.process_index == 0
        failure = current if isinstance(current, _Failure) else None
        told = [
            current is END,
            None if current is END or failure else get_data_structure(current),
            following is END,
            str(failure) if failure else None,
        ]
        ended, structure, last, problem = broadcast_object_list(told)
        if failure:
            raise failure.problem
        if problem:
            raise DistributedError(f"rank 0, which reads for all ranks, could not read a batch: {problem}")
        if ended:
            return END, True
        batch = current if reads else initialize_tensors(structure)
        batch = send_to_device(batch, self.state.device, non_blocking=self._non_blocking)
        return broadcast(batch, from_process=0), last

    def _cut(self, batch: Any, part: slice) -> Any:
        return self.slice_fn(
            batch, part, process_index=self.state.process_index, num_processes=self.state.num_processes
        )

    def _own(self, batch: Any, first: Any, last: bool) -> Any:
        """This rank's part; what is missing for equal parts is repeated from the epoch's first batch."""
        processes, rank = self.state.num_processes, self.state.process_index
        observed = find_batch_size(batch)
        share, rest = divmod(observed, processes)
        if rest and not self._drop_last:
            copies = math.ceil((processes - rest) / find_batch_size(first))
            batch, share = concatenate([batch] + [first] * copies), share + 1
        if last:
            self.remainder = observed
        return self._cut(batch, slice(rank * share, (rank + 1) * share))

    def __len__(self) -> int:
        whole = super().__len__()
        if not self.split_batches:
            parts = whole / self.state.num_processes
            whole = math.floor(parts) if self._drop_last else math.ceil(parts)
        return max(0, whole - self.skip_batches)

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
        yield from self._publish(self._looked_ahead(islice(super().__iter__(), self.skip_batches, None)))

    @staticmethod
    def _looked_ahead(source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        current = next(source, END)
        while current is not END:
            following = next(source, END)
            yield current, following is END
            current = following

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    @property
    def total_batch_size(self) -> int:
        """Samples in a batch."""
        return self.batch_size  # type: ignore[return-value]
