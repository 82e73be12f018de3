"""Datasets and samplers that the tests of this folder read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset


class Numbers(Dataset[torch.Tensor]):
    """0, 1, 2, ...; a list of indices gives a tensor of them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.tensor(index)


class Stream(IterableDataset[torch.Tensor]):
    """0, 1, 2, ... of unknown length; each worker process reads its own part."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from (torch.tensor(number) for number in range(start, self.length, step))


class SizedStream(Stream):
    """A `Stream` that knows its length."""

    def __len__(self) -> int:
        return self.length


class EpochStream(Stream):
    """A `Stream` whose numbers begin at 100 times the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (number + 100 * self.epoch for number in super().__iter__())


class Batches(BatchSampler):
    """Yields the lists that it was given; without a `batch_size`, unless told one."""

    def __init__(self, batches: list[list[int]], batch_size: int | None = None, drop_last: bool = False) -> None:
        self.batches = batches
        self.drop_last = drop_last
        if batch_size is not None:
            self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


def read(loader: Any) -> list[list[int]]:
    """The numbers of each batch of an epoch."""
    return [batch.reshape(-1).tolist() for batch in loader]
