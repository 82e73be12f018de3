"""Iterable datasets that keep their own place: the epoch goes on there, and nothing is read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.data_loader.sources import read
from tests.data_loader.test_positions import draw, stored
from tests.distributed.pool import RankPool
from zeroaccel.data_loader import prepare_data_loader, stateful
from zeroaccel.errors import UnsupportedError

LENGTH = 23
DISPATCH = {"dispatch_batches": True, "put_on_device": True}


class KeepingStream(IterableDataset[torch.Tensor]):
    """0, 1, 2, ... plus 100 times the epoch; knows its place, and how many it has made in this process."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.epoch = self.begin = self.at = self.made = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.begin = self.at = state_dict["at"]

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = range(first, self.length, step)
        begin, self.begin = self.begin, 0
        for place, number in enumerate(numbers[begin:], begin + 1):
            self.at, self.made = place, self.made + 1
            yield torch.tensor(number + 100 * self.epoch)


def prepared(world: int, rank: int, workers: int = 0, size: int = 2, **options: Any) -> Any:
    ranks = {} if options.get("dispatch_batches") else {"num_processes": world, "process_index": rank}
    loader = DataLoader(KeepingStream(), size, num_workers=workers, multiprocessing_context="fork" if workers else None)
    return prepare_data_loader(loader, use_stateful_dataloader=True, **ranks, **options)


def dataset_of(loader: Any) -> KeepingStream:
    return getattr(loader.dataset, "dataset", loader.dataset)  # type: ignore[no-any-return]


CASES: list[Any] = [
    *((1, 0, workers, {}) for workers in (0, 1, 2)),
    *((2, rank, workers, {}) for rank in (0, 1) for workers in (0, 2)),
    *((2, rank, 0, {"split_batches": True}) for rank in (0, 1)),
    (1, 0, 0, DISPATCH),
]


@pytest.mark.parametrize("torchdata", [True, False])
@pytest.mark.parametrize(("world", "rank", "workers", "options"), CASES)
def test_an_epoch_goes_on_where_the_dataset_was_and_again(
    monkeypatch: pytest.MonkeyPatch, world: int, rank: int, workers: int, options: dict[str, Any], torchdata: bool
) -> None:
    monkeypatch.setattr(stateful, "is_torchdata_stateful_dataloader_available", lambda: torchdata)
    case = (world, rank, workers)
    whole = prepared(*case, **options)
    epochs = [read(whole) for _ in range(3)]
    first = prepared(*case, **options)
    assert read(first) == epochs[0]
    begin, state = draw(first, 2)
    second = prepared(*case, **options)
    second.load_state_dict(state)
    more, state = draw(second, 1)
    third = prepared(*case, **options)
    third.load_state_dict(state)
    begin += more + read(third)
    last = slice(-1 if world == 2 else None)  # its repeated samples may be others
    assert begin[last] == epochs[1][last]
    if workers == 0:
        of_all = 2 if options.get("split_batches") else 2 * world
        assert dataset_of(third).made == LENGTH - (3 * of_all if torchdata else 0), "what was read is not read again"
    assert read(third) == epochs[2]


def resumed_by_checkpoint(folder: str, dispatch: bool) -> tuple[list[Any], list[Any], int]:
    from tests.data_loader.test_uneven import accelerator, make_model

    def make() -> tuple[Any, Any]:
        run = accelerator(2, use_stateful_dataloader=True, dispatch_batches=dispatch)
        model = make_model()
        _, _, loader = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(KeepingStream(), 2))
        return run, loader

    run, loader = make()
    expected: list[Any] = []
    for number, batch in enumerate(loader):
        if number == 1:
            run.save_state(folder)
        if number > 1:
            expected.append(batch.tolist())
    made = dataset_of(loader).made
    run.load_state(folder)
    return expected, read(loader), dataset_of(loader).made - made


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_checkpoint_of_two_ranks_holds_the_place(ranks: RankPool, tmp_path: Any, dispatch: bool) -> None:
    results = ranks.run(resumed_by_checkpoint, folder=str(tmp_path), dispatch=dispatch)
    for rank, (expected, found, made) in enumerate(results):
        assert found[:-1] == expected[:-1]
        assert len(found) == len(expected)
        assert made == (0 if dispatch and rank else LENGTH - 2 * 2 * 2)


def test_another_number_of_workers_is_refused() -> None:
    _, state = draw(prepared(1, 0, workers=2), 2)
    with pytest.raises(
        UnsupportedError, match=r"num_workers 2, and cannot be taken up there with .* num_workers 0: resume"
    ):
        prepared(1, 0).load_state_dict(state)


def test_the_place_is_that_of_the_batch_in_hand() -> None:
    loader = prepared(1, 0)
    for number, _ in enumerate(loader, 1):
        assert stored(loader)["place"]["dataset_state"] == {"at": min(2 * number, LENGTH)}


class BufferShuffledExamplesIterable:
    """Of `datasets`, whose shuffled streams do not keep what lies in their buffer."""


class Formatted:
    ex_iterable = BufferShuffledExamplesIterable()


class ShuffledStream(KeepingStream):
    _ex_iterable = Formatted()


def test_a_stream_whose_place_is_not_exact_is_read_again() -> None:
    assert stateful.keeps_its_place(KeepingStream())
    assert not stateful.keeps_its_place(ShuffledStream())
