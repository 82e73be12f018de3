"""Iterable datasets that keep their own place, such as those of Hugging Face: resumed without reading all again.

torchdata's StatefulDataLoader asks the dataset for its place behind every batch, in worker processes too. Without it,
and for datasets that cannot tell, what was read is read again and left out (position.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from zeroaccel.config.packages import is_torchdata_stateful_dataloader_available
from zeroaccel.data_loader.parts import kept_options, source_options
from zeroaccel.data_loader.sharding import IterableDatasetShard


def keeps_its_place(dataset: Any) -> bool:
    """Whether this is an iterable dataset that can tell and take up its place, and torchdata is there to ask it."""
    able = (
        isinstance(dataset, IterableDataset) and hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    )
    return able and not _forgets_its_buffer(dataset) and is_torchdata_stateful_dataloader_available()


def _forgets_its_buffer(dataset: Any) -> bool:
    """Whether this is a `datasets.IterableDataset` that shuffles: its place leaves out what lies in the buffer."""
    source = getattr(dataset, "_ex_iterable", None)
    while source is not None and type(source).__name__ != "BufferShuffledExamplesIterable":
        source = getattr(source, "ex_iterable", None)
    return source is not None


class StatefulShard(IterableDatasetShard):
    """The shard of a dataset that keeps its place: between two batches of all ranks that is the shard's place, too."""

    def state_dict(self) -> Any:
        """Place of the dataset."""
        return self.dataset.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The next iteration begins at that place."""
        self.dataset.load_state_dict(state_dict)


class Places:
    """Reads a loader's dataset, and remembers its place behind each of the last batches.

    Args:
        loader: over a dataset that keeps its place.
        ahead: batches that may be read before the script gets the first of them.
    """

    def __init__(self, loader: Any, ahead: int) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        self._reader = StatefulDataLoader(loader.dataset, **source_options(loader, None), **kept_options(loader))
        self._ahead = ahead
        self._after: dict[int, Any] = {}

    def read_from(self, read: int, place: Any, generator: torch.Generator | None) -> Iterator[Any]:
        """The batches of an epoch behind the first `read`.

        Args:
            read: number of batches.
            place: of the dataset behind them; None: they are read and left out.
            generator: gives the seed of workers.
        """
        self._after = {read: place}
        self._reader.generator = generator
        if place is not None:
            self._reader.load_state_dict(place)
        source = islice(iter(self._reader), read if place is None else 0, None)
        for number, batch in enumerate(source, read + 1):
            self._after[number] = self._reader.state_dict()
            self._after.pop(number - self._ahead - 1, None)
            yield batch

    def after(self, read: int) -> Any:
        """Place of the dataset behind the first `read` batches; None if it is not known."""
        return self._after.get(read)
