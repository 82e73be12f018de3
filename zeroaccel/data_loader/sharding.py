"""Which samples a rank gets: shards of batch samplers and of iterable datasets, seeded shuffling, skipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

from zeroaccel.errors import ConfigError


class SeedableRandomSampler(RandomSampler):
    """A `RandomSampler` whose order depends on a seed and the epoch alone.

    Args:
        data_seed: the seed; default: drawn from PyTorch's.
        args, kwargs: of `torch.utils.data.RandomSampler`.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = data_seed if data_seed is not None else torch.random.initial_seed()
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.epoch + self.initial_seed)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of `epoch`."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """One rank's batches of a batch sampler.

    Args:
        batch_sampler: yields lists of indices. One without a `batch_size` may yield anything: its elements are handed
            out in turn as they are.
        num_processes, process_index: world size and rank.
        split_batches: cut each batch for the ranks, instead of handing out whole batches in turn.
        even_batches: repeat indices from the beginning, so that every rank gets equally many full batches.

    Attributes:
        remainder: real indices in the last global batch of the newest epoch, known once its last batch was drawn; 0
            if it was full, -1 if its elements have no length.
        begin_at: batches of `batch_sampler` that the next epoch, and no other, leaves out at its beginning.

    Raises:
        ConfigError: `split_batches` with a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self.remainder = 0
        self.begin_at = 0
        if split_batches:
            check_divides(self.batch_size, num_processes)

    @property
    def total_length(self) -> int:
        """Batches of all ranks together."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        total = len(self.batch_sampler)
        if self.split_batches:
            return total
        length, rest = divmod(total, self.num_processes)
        if rest == 0 or self.drop_last:
            return length
        return length + 1 if self.even_batches or self.process_index < rest else length

    def __iter__(self) -> Iterator[list[Any]]:
        self.remainder = 0
        return self._split() if self.split_batches else self._take_turns()

    def _split(self) -> Iterator[list[Any]]:
        begin_at, self.begin_at = self.begin_at, 0
        size = self.batch_size // self.num_processes
        mine = slice(size * self.process_index, size * (self.process_index + 1))
        first: list[Any] | None = None
        for number, batch in enumerate(self.batch_sampler):
            first = list(batch) if first is None else first
            if number < begin_at:
                continue
            if len(batch) == self.batch_size:
                yield batch[mine]
            elif not self.drop_last:
                self.remainder = len(batch)
                full = list(batch) + list(islice(cycle(first), self.batch_size)) if self.even_batches else list(batch)
                if full[mine]:
                    yield full[mine]

    def _take_turns(self) -> Iterator[list[Any]]:
        begin_at, self.begin_at = self.begin_at, 0
        beginning: list[Any] = []
        turn: list[Any] = []
        for number, batch in enumerate(self.batch_sampler):
            if len(turn) == self.num_processes:  # so the short batch in it was not the epoch's last
                yield turn[self.process_index]
                turn = []
            if len(beginning) < self.num_processes:
                beginning.append(batch)
            if number < begin_at:
                continue
            turn.append(batch)
            if len(turn) == self.num_processes and self._is_full(batch):
                yield turn[self.process_index]
                turn = []
        if turn and not self.drop_last:
            self.remainder = sum(map(len, turn)) if isinstance(turn[0], Sized) else -1
            yield from self._last_turn(turn, beginning)

    def _is_full(self, batch: Any) -> bool:
        return self.batch_size is None or len(batch) >= self.batch_size

    def _last_turn(self, turn: list[Any], beginning: list[Any]) -> Iterator[list[Any]]:
        """An incomplete turn, filled up from the beginning of the epoch."""
        if not self.even_batches:
            if self.process_index < len(turn):
                yield turn[self.process_index]
            return
        if self.batch_size is None:
            yield next(islice(chain(turn, cycle(beginning)), self.process_index, None))
            return
        indices = list(chain.from_iterable(turn))
        # A sampler may yield more than its batch_size says.
        size = max(self.batch_size, math.ceil(len(indices) / self.num_processes))
        filled = chain(indices, cycle(chain.from_iterable(beginning)))
        yield list(islice(filled, self.process_index * size, (self.process_index + 1) * size))


def check_divides(batch_size: int | None, num_processes: int) -> None:
    """`split_batches` cuts a batch into equal parts.

    Raises:
        ConfigError: it cannot.
    """
    if batch_size is None or batch_size % num_processes != 0:
        raise ConfigError(
            f"split_batches cuts each batch for {num_processes} ranks, but the batch size is {batch_size}: use a"
            f" multiple of {num_processes}, or split_batches=False"
        )


class IterableDatasetShard(IterableDataset[Any]):
    """One rank's elements of an iterable dataset: every rank reads all of it and keeps its part of each global batch.

    Args:
        dataset: the dataset, in the same order on every rank.
        batch_size: of one rank, or of all with `split_batches`; None: each element is a batch already.
        drop_last: leave out an incomplete last global batch; else it is filled from the first one.
        num_processes, process_index: world size and rank.
        split_batches: see `batch_size`.

    Attributes:
        remainder: real samples in the last global batch of the newest epoch, known once that was read; 0 if it was
            full, -1 if they cannot be counted: elements are batches, or a worker process reads.

    Raises:
        ConfigError: `split_batches` with a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        if split_batches:
            check_divides(batch_size, num_processes)
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.epoch = 0
        self.remainder = -1

    def set_epoch(self, epoch: int) -> None:
        """Tells the dataset, or its generator, which epoch comes."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    @property
    def _global_batch(self) -> int:
        """Elements of all ranks in a batch."""
        size = 1 if self.batch_size is None else self.batch_size
        return size if self.split_batches else size * self.num_processes

    def __len__(self) -> int:
        in_all = len(self.dataset) / self._global_batch
        share = self._global_batch // self.num_processes
        return (math.floor(in_all) if self.drop_last else math.ceil(in_all)) * share

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(generator, torch.Generator):
            generator.manual_seed(self.epoch)
        in_all = self._global_batch
        share = in_all // self.num_processes
        mine = slice(self.process_index * share, (self.process_index + 1) * share)
        self.remainder = 0
        first: list[Any] | None = None
        batch: list[Any] = []
        for element in self.dataset:
            batch.append(element)
            if len(batch) == in_all:
                yield from batch[mine]
                first, batch = first or batch, []
        if batch and not self.drop_last:
            self.remainder = -1 if self.batch_size is None else len(batch)
            batch += islice(cycle(first or list(batch)), in_all - len(batch))
            yield from batch[mine]


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __iter__(self) -> Iterator[list[Any]]:
        yield from islice(iter(self.batch_sampler), self.skip_batches, None)

    @property
    def total_length(self) -> int:
        """Batches without skipping."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)
