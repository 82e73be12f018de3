"""Prepared loaders: they shard, move batches to the device, and know their last batch before they yield it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from zeroaccel.data_loader.columns import batch_size_of, cut, join
from zeroaccel.data_loader.handing import Failure, FromRank0
from zeroaccel.data_loader.joint import END, together
from zeroaccel.data_loader.parts import get_sampler, outer_sampler, samplers_of
from zeroaccel.data_loader.position import Positioned
from zeroaccel.data_loader.sharding import IterableDatasetShard
from zeroaccel.distributed.nested import send_to_device
from zeroaccel.distributed.random import synchronize_rng_states
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.state import GradientState, PartialState


def refuse_mesh(torch_device_mesh: Any) -> None:
    """Tensor parallelism is another library's.

    Raises:
        UnsupportedError: there is a mesh.
    """
    if torch_device_mesh is not None:
        raise UnsupportedError(
            "torch_device_mesh is for tensor parallelism, which this library does not do: leave it out"
        )


class DataLoaderStateMixin:
    """What a loader publishes to the `GradientState` while it is iterated.

    Attributes:
        end_of_dataloader: whether the current batch is the last.
        remainder: real samples in the last global batch, 0 (or its size) if it is full, -1 if nothing can be said.
        iteration: number of the epoch.
        batch_sizes: samples that each rank has in the current batch; None where the ranks did not ask each other.
        filler: whether this rank ran out of batches and has its last one again (joint.py).
    """

    end_of_dataloader = False
    remainder = -1
    iteration = 0
    batch_sizes: list[int] | None = None
    filler = False
    gradient_state: GradientState
    _drop_last = False

    def reset(self) -> None:
        """Back to the state before an epoch."""
        self.end_of_dataloader = False
        self.batch_sizes, self.filler = None, False
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


class _Prepared(DataLoaderStateMixin, Positioned):
    """A `DataLoader` that was made from another one."""

    def _publish(self, batches: Iterator[tuple[Any, bool]]) -> Iterator[Any]:
        """Yields batches that come with "is the last"."""
        self.begin()
        own = vars(self)  # an assignment to a DataLoader's attribute costs a microsecond
        state = self.gradient_state
        try:
            for batch, own["end_of_dataloader"] in batches:
                own["_drawn"] += 1
                state.batches_drawn += 1
                yield batch
            self._epoch_drawn()
            self.gradient_state._epoch_ended()
        finally:
            self.end()

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


class DataLoaderShard(_Prepared):
    """The batches of one rank.

    Args:
        dataset: the dataset, or its shard.
        device: where batches go; None leaves them.
        rng_types, synchronized_generator: generators to synchronize before each epoch.
        skip_batches: batches to leave out at the beginning, for iterable datasets.
        use_stateful_dataloader: the epoch goes on by itself where a loaded state says.
        kwargs: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: list[Any] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_mesh(torch_device_mesh)
        super().__init__(dataset, **kwargs)
        self.use_stateful_dataloader = use_stateful_dataloader
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.iteration = iteration

    def __iter__(self) -> Any:
        taken = self._take_up()
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.set_epoch(self.iteration)
        self._begin_at(taken)
        yield from self._publish(self._batches(self._open(taken)))

    def _batches(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        source = islice(source, self.skip_batches, None) if self.skip_batches else source
        return self._in_rounds(source) if self._may_be_uneven() else self._one_by_one(source)

    def _one_by_one(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        current = next(source, END)
        while current is not END:
            # Moved before the next one is fetched, so that copy and fetch overlap.
            current = self._moved(current)
            following = next(source, END)
            if following is END:
                self._measure_remainder()
            yield current, following is END
            current = following

    def _in_rounds(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        for each in together(lambda: self._moved(next(source, END)), self._moved, self.gradient_state):
            self.batch_sizes, self.filler = each.sizes, each.filler
            if each.last:
                self._measure_remainder()
            yield each.batch, each.last

    def _moved(self, batch: Any) -> Any:
        if self.device is None or batch is END:
            return batch
        return send_to_device(batch, self.device, non_blocking=self._non_blocking)

    def _may_be_uneven(self) -> bool:
        """Whether ranks may have different numbers of batches while models need all ranks."""
        if self._world_size == 1 or self._world_size != PartialState().num_processes:
            return False
        if not self.gradient_state._has_joint_engines:
            return False
        filled = getattr(self._shard, "even_batches", True) or getattr(self._shard, "drop_last", False)
        return isinstance(self.dataset, IterableDataset) or not filled

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    @property
    def _read_in_turn(self) -> int:
        shard = self._shard
        whole = isinstance(self.dataset, IterableDataset) or getattr(shard, "split_batches", False)
        return 1 if whole else int(getattr(shard, "num_processes", 1))

    @property
    def _shard(self) -> Any:
        """What gives this rank its part; None where an iterable dataset is read whole."""
        if isinstance(self.dataset, IterableDataset):
            return self.dataset if isinstance(self.dataset, IterableDatasetShard) else None
        return outer_sampler(self)

    def _measure_remainder(self) -> None:
        """The shard counted; the length of the dataset is a guess where a sampler draws fewer samples, or more."""
        if self._shard is None and self._world_size > 1:
            self.remainder = 0  # each rank reads files of its own, nothing is repeated
            return
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
        use_stateful_dataloader: the epoch goes on by itself where a loaded state says.
        slice_fn: cuts a batch: `slice_fn(batch, slice, process_index=..., num_processes=...)`.
        kwargs: of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_mesh(torch_device_mesh)
        super().__init__(dataset, **kwargs)
        self.use_stateful_dataloader = use_stateful_dataloader
        self.split_batches = split_batches
        self.skip_batches = skip_batches
        self.slice_fn = slice_fn or cut
        self.gradient_state = GradientState()
        self.state = PartialState()
        self._world_size = self.state.num_processes
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        self.iteration = iteration

    def __iter__(self) -> Any:
        taken = self._take_up()
        self.set_epoch(self.iteration)
        self._begin_at(taken)
        source = self._global_batches(self._open(taken)) if self.state.process_index == 0 else iter(())
        yield from self._publish(self._shares(source))

    @property
    def _read_in_turn(self) -> int:
        return 1 if self.split_batches else self.state.num_processes

    @property
    def _may_draw_from_torch(self) -> bool:
        return True  # of rank 0, which reads alone

    def _global_batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """On rank 0: what all ranks get together, or in the end the exception that stops them."""
        count = self._read_in_turn
        try:
            for _ in islice(source, self.skip_batches * count):
                pass
            while parts := list(islice(source, count)):
                if self._drop_last and len(parts) < count:
                    return
                yield self._joined(parts)
        except Exception as problem:  # the others must hear of it, they wait for a batch
            yield Failure(problem)

    def _joined(self, parts: list[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        try:
            return join(parts)
        except RuntimeError as error:
            raise ConfigError(
                "dispatch_batches joins the batches of all ranks, and these have different shapes: pad them"
                f" (a collate_fn), or use dispatch_batches=False or split_batches=True. PyTorch said: {error}"
            ) from error

    def _shares(self, source: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        first = None
        from_rank_0 = FromRank0(self._non_blocking)
        current = next(source, END)
        last = False
        while not last:
            following = END if isinstance(current, Failure) else next(source, END)
            batch, last = from_rank_0.hand_out(current, following is END)
            if batch is END:
                return
            if first is None:
                first = self._cut(batch, slice(0, self.state.num_processes))
            yield self._own(batch, first, last), last
            current = following

    def _cut(self, batch: Any, part: slice) -> Any:
        return self.slice_fn(
            batch, part, process_index=self.state.process_index, num_processes=self.state.num_processes
        )

    def _own(self, batch: Any, first: Any, last: bool) -> Any:
        """This rank's part; what is missing for equal parts is repeated from the epoch's first batch."""
        processes, rank = self.state.num_processes, self.state.process_index
        observed = batch_size_of(batch)
        share, rest = divmod(observed, processes)
        if rest and not self._drop_last:
            copies = math.ceil((processes - rest) / batch_size_of(first))
            batch, share = join([batch] + [first] * copies), share + 1
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

    def __init__(
        self,
        dataset: Any,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.use_stateful_dataloader = use_stateful_dataloader
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self.iteration = iteration

    def __iter__(self) -> Any:
        taken = self._take_up()
        self._begin_at(taken)
        yield from self._publish(self._looked_ahead(islice(self._open(taken), self.skip_batches, None)))

    @property
    def _read_in_turn(self) -> int:
        return 1

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
