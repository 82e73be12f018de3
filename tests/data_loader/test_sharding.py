from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from typing import Any

import accelerate.data_loader as theirs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from tests.data_loader.sources import Batches, SizedStream, Stream
from zeroaccel import data_loader as ours
from zeroaccel.errors import ConfigError

WORLDS = [(world, rank) for world in (1, 2, 3, 4) for rank in range(world)]
FLAGS = [False, True]


def batch_shard(library: Any, length: int, size: int, drop_last: bool, *args: Any) -> Any:
    return library.BatchSamplerShard(BatchSampler(SequentialSampler(range(length)), size, drop_last), *args)


@pytest.mark.parametrize("drop_last", FLAGS)
@pytest.mark.parametrize("even_batches", FLAGS)
@pytest.mark.parametrize("split_batches", FLAGS)
def test_a_rank_draws_the_indices_that_accelerate_gives_it(
    split_batches: bool, even_batches: bool, drop_last: bool
) -> None:
    for length, size, (world, rank) in product(range(41), (1, 2, 3, 4, 8), WORLDS):
        if split_batches and size % world:
            continue
        ranks = (world, rank, split_batches, even_batches)
        expected = batch_shard(theirs, length, size, drop_last, *ranks)
        shard = batch_shard(ours, length, size, drop_last, *ranks)
        assert list(shard) == list(expected), (length, size, ranks)
        assert len(shard) == len(expected), (length, size, ranks)


def test_a_batch_sampler_without_batch_size_is_handed_out_as_by_accelerate() -> None:
    for count, even_batches, (world, rank) in product(range(9), FLAGS, WORLDS):
        batches = [list(range(number, 2 * number + 1)) for number in range(count)]
        pair = [
            library.BatchSamplerShard(Batches(batches), world, rank, even_batches=even_batches)
            for library in (ours, theirs)
        ]
        assert list(pair[0]) == list(pair[1]), (count, even_batches, world, rank)


@pytest.mark.parametrize("drop_last", FLAGS)
@pytest.mark.parametrize("split_batches", FLAGS)
def test_a_rank_reads_the_elements_that_accelerate_gives_it(split_batches: bool, drop_last: bool) -> None:
    for length, size, (world, rank) in product(range(41), (1, 2, 3, 4, 8), WORLDS):
        if split_batches and size % world:
            continue
        arguments = (size, drop_last, world, rank, split_batches)
        shard = ours.IterableDatasetShard(SizedStream(length), *arguments)
        expected = theirs.IterableDatasetShard(SizedStream(length), *arguments)
        assert list(shard) == list(expected), (length, arguments)
        # Accelerate counts too many where it splits batches.
        assert len(shard) == len(list(expected)), (length, arguments)


@given(
    st.lists(st.integers(1, 4), max_size=12),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, 4]),
)
def test_batches_of_any_length_lose_no_index(
    sizes: list[int], world: int, even_batches: bool, batch_size: int | None
) -> None:
    """Accelerate loses the short batches in the middle of an epoch."""
    numbers = iter(range(100))
    batches = [[next(numbers) for _ in range(size)] for size in sizes]
    shards = [
        ours.BatchSamplerShard(Batches(batches, batch_size), world, rank, even_batches=even_batches)
        for rank in range(world)
    ]
    drawn = [list(shard) for shard in shards]
    assert set(chain.from_iterable(chain.from_iterable(drawn))) == set(chain.from_iterable(batches))
    assert [len(each) for each in drawn] == [len(shard) for shard in shards]
    if even_batches:
        assert len({len(each) for each in drawn}) == 1
    if drawn[0]:
        last = list(chain.from_iterable(each[-1] for each in drawn if len(each) == len(drawn[0])))
        for shard in shards:
            real = last[: shard.remainder] if shard.remainder else last
            assert len(set(real)) == len(real), "the last global batch cut to its remainder has no duplicates"


def test_a_sampler_that_yields_more_than_its_batch_size_says_loses_no_index() -> None:
    batches = [[0, 1, 2], [3, 4, 5, 6, 7], [8]]
    drawn = [list(ours.BatchSamplerShard(Batches(batches, 2), 2, rank)) for rank in (0, 1)]
    assert drawn == [[[0, 1, 2], [8, 0]], [[3, 4, 5, 6, 7], [1, 2]]]


@pytest.mark.parametrize(
    ("shard", "remainder"),
    [
        (batch_shard(ours, 8, 2, False, 2, 0), 0),
        (batch_shard(ours, 9, 2, False, 2, 1), 1),
        (batch_shard(ours, 11, 2, False, 2, 0), 3),
        (batch_shard(ours, 11, 2, True, 2, 0), 0),
        (batch_shard(ours, 11, 4, False, 2, 1, True), 3),
        (ours.BatchSamplerShard(Batches([[0, 1], [2], [3, 4, 5]]), 2, 0), 3),
        (ours.BatchSamplerShard(SequentialSampler(range(5)), 2, 0), -1),
        (ours.BatchSamplerShard(SequentialSampler(range(4)), 2, 0), 0),
        (ours.IterableDatasetShard(Stream(8), 2, False, 2, 0), 0),
        (ours.IterableDatasetShard(Stream(11), 2, False, 2, 0), 3),
        (ours.IterableDatasetShard(Stream(11), 2, True, 2, 0), 0),
        (ours.IterableDatasetShard(Stream(3), None, False, 2, 0), -1),
    ],
)
def test_a_shard_counts_the_real_samples_of_its_last_batch(shard: Any, remainder: int) -> None:
    list(shard)
    assert shard.remainder == remainder


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda size: ours.BatchSamplerShard(Batches([], size), 2, 0, split_batches=True),
        lambda size: ours.IterableDatasetShard(Stream(4), size, False, 2, 0, split_batches=True),
    ],
)
def test_a_batch_that_the_ranks_do_not_divide_cannot_be_split(make: Callable[[Any], Any], size: int | None) -> None:
    with pytest.raises(ConfigError, match=f"batch size is {size}: use a multiple of 2"):
        make(size)


def test_a_seeded_order_depends_on_seed_and_epoch_alone_and_is_that_of_accelerate() -> None:
    def orders(library: Any) -> list[list[int]]:
        sampler = library.SeedableRandomSampler(range(9), data_seed=5)
        found = [list(sampler) for _ in range(3)]
        sampler.set_epoch(1)
        return [*found, list(sampler)]

    torch.manual_seed(1)
    first = orders(ours)
    torch.manual_seed(2)
    assert orders(ours) == first == orders(theirs)
    assert first[1] == first[3] != first[0]


@pytest.mark.parametrize("skip", [0, 2, 9])
def test_a_skipping_sampler_is_as_long_as_what_it_yields(skip: int) -> None:
    sampler = ours.SkipBatchSampler(Batches([[0], [1], [2]], batch_size=1), skip)
    assert list(sampler) == [[0], [1], [2]][skip:]
    assert len(sampler) == len(list(sampler))
    assert sampler.batch_size == 1
    assert sampler.total_length == 3
