"""Loaders of two real ranks: what each sample's fate is, and that no rank waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, WeightedRandomSampler

from tests.data_loader.sources import Batches, Numbers, SizedStream, Stream, read
from tests.distributed.pool import RankPool
from zeroaccel.data_loader import prepare_data_loader, skip_first_batches
from zeroaccel.distributed.operations import gather_for_metrics
from zeroaccel.distributed.random import set_seed
from zeroaccel.state import GradientState, PartialState


def subset(length: int, size: int) -> DataLoader[Any]:
    """Draws `length` of more samples: the length of the dataset says nothing."""
    return DataLoader(Numbers(length + 5), size, sampler=SubsetRandomSampler(range(length)))


def dropping_batches(length: int, size: int) -> DataLoader[Any]:
    """Its sampler has dropped, so that nothing is left to cut; the loader itself says `drop_last=False`."""
    batches = [list(range(start, start + size)) for start in range(0, length - size + 1, size)]
    return DataLoader(Numbers(length), batch_sampler=Batches(batches, size, drop_last=True))


def uneven_batches(length: int, size: int) -> DataLoader[Any]:
    batches = [list(range(start, min(length, start + size))) for start in range(0, length, size)]
    return DataLoader(Numbers(length), batch_sampler=Batches([batch for batch in batches if batch], None))


# Name -> (loader of (length, batch size), options of prepare_data_loader).
DISPATCH: dict[str, Any] = {"dispatch_batches": True, "put_on_device": True}
METRIC_LOADERS: dict[str, tuple[Callable[[int, int], DataLoader[Any]], dict[str, Any]]] = {
    "in order": (lambda n, size: DataLoader(Numbers(n), size), {}),
    "shuffled": (lambda n, size: DataLoader(Numbers(n), size, shuffle=True), {"rng_types": ["generator"]}),
    "split": (lambda n, size: DataLoader(Numbers(n), 2 * size), {"split_batches": True}),
    "a subset": (subset, {"rng_types": ["generator"]}),
    "no batch size": (uneven_batches, {}),
    "stream": (lambda n, size: DataLoader(Stream(n), size), {}),
    "stream, split": (lambda n, size: DataLoader(Stream(n), 2 * size), {"split_batches": True}),
    "sized stream": (lambda n, size: DataLoader(SizedStream(n), size), {}),
    "dispatched": (lambda n, size: DataLoader(Numbers(n), size), DISPATCH),
    "dispatched, split": (lambda n, size: DataLoader(Numbers(n), 2 * size), {**DISPATCH, "split_batches": True}),
    "dispatched stream": (lambda n, size: DataLoader(Stream(n), size), {"put_on_device": True}),
}


def gathered_epoch(loader: Any) -> tuple[list[int], list[int]]:
    """All samples that `gather_for_metrics` gave, from tensors and from objects."""
    state = GradientState()
    tensors: list[int] = []
    objects: list[int] = []
    for batch in loader:
        tensors += gather_for_metrics({"x": (batch,)}, state)["x"][0].tolist()
        objects += gather_for_metrics([str(number) for number in batch.tolist()], state)
    return tensors, [int(number) for number in objects]


def metrics_of(name: str) -> None:
    make, options = METRIC_LOADERS[name]
    for length, size in product((1, 2, 3, 4, 7, 8, 9), (1, 2, 3)):
        if name == "no batch size" and length % size:
            continue  # ranks with batches of different shapes cannot gather
        loader = prepare_data_loader(make(length, size), **options)
        for epoch in range(2):
            for found in gathered_epoch(loader):
                assert sorted(found) == list(range(length)), (length, size, epoch, found)


@pytest.mark.parametrize("name", METRIC_LOADERS)
def test_metrics_see_every_sample_once(ranks: RankPool, name: str) -> None:
    ranks.run(metrics_of, name=name)


def metrics_of_dropping_loaders() -> list[int]:
    made = [
        prepare_data_loader(dropping_batches(11, 2)),
        prepare_data_loader(DataLoader(Numbers(11), 2, drop_last=True)),
        prepare_data_loader(DataLoader(Stream(11), 2, drop_last=True), put_on_device=True),
    ]
    return [len(gathered_epoch(loader)[0]) for loader in made]


def test_metrics_of_loaders_that_drop_lose_no_more(ranks: RankPool) -> None:
    """Accelerate cuts the last, full batch of a batch sampler that dropped by itself."""
    assert ranks.run(metrics_of_dropping_loaders) == [[8, 8, 8]] * 2


def metrics_of_weighted_draws() -> list[int]:
    sampler = WeightedRandomSampler([1.0] * 4, num_samples=9, replacement=True)
    loader = prepare_data_loader(DataLoader(Numbers(4), 2, sampler=sampler), rng_types=["generator"])
    return gathered_epoch(loader)[0]


def test_metrics_count_a_sample_as_often_as_it_was_drawn(ranks: RankPool) -> None:
    first, second = ranks.run(metrics_of_weighted_draws)
    assert first == second
    assert len(first) == 9


# --- shuffling ----------------------------------------------------------------------------------------------------


def two_shuffled_epochs(options: dict[str, Any], explicit: bool) -> list[list[int]]:
    rank = PartialState().process_index
    set_seed(5, device_specific=True)
    if explicit:
        sampler = BatchSampler(SubsetRandomSampler(range(11)), 2, False)
        loader = prepare_data_loader(DataLoader(Numbers(11), batch_sampler=sampler), **options)
    else:
        loader = prepare_data_loader(DataLoader(Numbers(11), 2, shuffle=True), **options)
    epochs = []
    for _ in range(2):
        torch.rand(rank)  # ranks may consume random numbers as they like
        for _ in loader:
            break
        epochs.append([number for batch in read(loader) for number in batch])
    return epochs


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rng_types": ["generator"]},
        {"rng_types": ["torch"]},
        {"rng_types": []},
        {"use_seedable_sampler": True},
        {"use_seedable_sampler": True, "data_seed": 4},
        {"use_seedable_sampler": True, "rng_types": ["generator"]},
    ],
)
def test_ranks_with_different_seeds_shuffle_alike_and_share_the_samples(
    ranks: RankPool, options: dict[str, Any], explicit: bool
) -> None:
    first, second = ranks.run(two_shuffled_epochs, options=options, explicit=explicit)
    for one, other in zip(first, second, strict=True):
        assert set(one) | set(other) == set(range(11))
        assert len(one) + len(other) == 12, "one sample is repeated"
    assert first[0] != first[1], "each epoch has an order of its own"


# --- dispatching --------------------------------------------------------------------------------------------------


def dispatched(length: int, size: int, options: dict[str, Any]) -> tuple[list[list[int]], int]:
    loader = prepare_data_loader(DataLoader(SizedStream(length), size, **options), put_on_device=True)
    return read(loader), len(loader)


@pytest.mark.parametrize(
    ("length", "size", "options", "batches"),
    [
        (8, 2, {}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (6, 2, {}, [[[0, 1], [4]], [[2, 3], [5]]]),
        (5, 2, {}, [[[0, 1], [4]], [[2, 3], [0]]]),
        (1, 2, {}, [[[0]], [[0]]]),
        (0, 2, {}, [[], []]),
        (7, 2, {"drop_last": True}, [[[0, 1]], [[2, 3]]]),
    ],
)
def test_rank_0_hands_out_each_joint_batch_in_equal_parts(
    ranks: RankPool, length: int, size: int, options: dict[str, Any], batches: list[list[list[int]]]
) -> None:
    found = ranks.run(dispatched, length=length, size=size, options=options)
    assert found == [(each, len(each)) for each in batches]


def skip_dispatched() -> list[list[list[int]]]:
    made = [
        prepare_data_loader(DataLoader(dataset, 2), put_on_device=True, dispatch_batches=True)
        for dataset in (Numbers(11), Stream(11))
    ]
    return [read(skip_first_batches(loader, 2)) for loader in made]


def test_a_dispatched_loader_skips_batches_of_a_rank(ranks: RankPool) -> None:
    first, second = ranks.run(skip_dispatched)
    assert [batches[0][0] for batches in first] == [8, 8]
    assert [batches[0][0] for batches in second] == [10, 10]


def leave_dispatched_early() -> list[list[int]]:
    loader = prepare_data_loader(DataLoader(Stream(8), 2), put_on_device=True)
    for _ in loader:
        break
    assert GradientState().active_dataloader is None
    return read(loader)


def test_a_dispatched_loader_that_was_left_early_begins_anew(ranks: RankPool) -> None:
    assert ranks.run(leave_dispatched_early) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def whole_batch_to_rank_1(batch: Any, part: slice, process_index: int, num_processes: int) -> Any:
    return batch[:0] if process_index == 0 else batch


def cut_by_the_script() -> list[list[int]]:
    loader = DataLoader(Stream(4), 2)
    return read(prepare_data_loader(loader, put_on_device=True, slice_fn_for_dispatch=whole_batch_to_rank_1))


def test_the_script_may_cut_the_batches_itself(ranks: RankPool) -> None:
    assert ranks.run(cut_by_the_script) == [[[]], [[0, 1, 2, 3]]]


class Broken(Stream):
    """Fails, or changes its shape, at the sixth element."""

    def __init__(self, breaks: bool) -> None:
        super().__init__(8)
        self.breaks = breaks

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(8):
            if number == 6 and self.breaks:
                raise OSError("disk is gone")
            yield torch.zeros(3 if number >= 6 else 2)


def read_until_it_breaks(breaks: bool) -> tuple[int, str, str]:
    seen = 0
    try:
        for _ in prepare_data_loader(DataLoader(Broken(breaks), 2), put_on_device=True):
            seen += 1
    except Exception as error:
        return seen, type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("breaks", "name", "text"),
    [(True, "OSError", "disk is gone"), (False, "ConfigError", "these have different shapes: pad them")],
)
def test_what_rank_0_cannot_read_is_an_error_on_every_rank(ranks: RankPool, breaks: bool, name: str, text: str) -> None:
    reader, receiver = ranks.run(read_until_it_breaks, breaks=breaks, timeout=20.0)
    assert reader[:2] == (1, name)
    assert receiver[:2] == (1, "DistributedError")
    assert text in reader[2]
    assert "rank 0, which reads for all ranks, could not read a batch" in receiver[2]
    assert text in receiver[2]
