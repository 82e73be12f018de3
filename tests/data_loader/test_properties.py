"""What holds for every map-style loader: dataset length x batch size x world x drop_last x even x split x shuffle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from types import ModuleType
from typing import Any

import accelerate.data_loader as theirs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.data_loader.sources import Numbers, Stream, read
from zeroaccel import data_loader as ours
from zeroaccel.state import GradientState


@dataclass(frozen=True)
class Case:
    """A loader and its world.

    Attributes:
        size: of a rank's batch.
    """

    length: int
    size: int
    world: int
    drop_last: bool
    even: bool
    split: bool
    shuffle: bool

    @property
    def in_all(self) -> int:
        """Samples of all ranks in a full batch."""
        return self.size * self.world

    def loader(self, library: ModuleType, rank: int, dataset: Any = None) -> Any:
        generator = torch.Generator().manual_seed(7) if self.shuffle else None
        raw = DataLoader(
            Numbers(self.length) if dataset is None else dataset,
            self.in_all if self.split else self.size,
            shuffle=self.shuffle and dataset is None,
            drop_last=self.drop_last,
            generator=generator,
        )
        return library.prepare_data_loader(
            raw,
            num_processes=self.world,
            process_index=rank,
            split_batches=self.split,
            even_batches=self.even,
            rng_types=["generator"],
        )

    def drawn(self, library: ModuleType = ours) -> list[list[list[int]]]:
        """The batches of each rank."""
        return [read(self.loader(library, rank)) for rank in range(self.world)]


CASES = st.builds(
    Case,
    length=st.integers(1, 60),
    size=st.integers(1, 9),
    world=st.integers(1, 5),
    drop_last=st.booleans(),
    even=st.booleans(),
    split=st.booleans(),
    shuffle=st.booleans(),
)


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@given(CASES)
@settings(max_examples=250, deadline=None)
def test_every_sample_is_drawn_and_only_filling_repeats(case: Case) -> None:
    ranks = case.drawn()
    counts = Counter(number for batches in ranks for number in flat(batches))
    total = sum(counts.values())
    if case.drop_last:
        assert set(counts.values()) <= {1}
        assert case.length - total < case.in_all, "less than one batch of all ranks is dropped"
        assert total % case.size == 0
    else:
        assert set(counts) == set(range(case.length)), "nothing is lost"
        # A single process has nothing to even out.
        filled = -case.length % case.in_all if case.even and case.world > 1 else 0
        assert total - case.length == filled, "no more is repeated than fills the last batch"
        assert max(counts.values()) - min(counts.values()) <= 1 or case.length < case.in_all


@given(CASES)
@settings(max_examples=250, deadline=None)
def test_lengths_are_what_is_drawn_and_equal_where_batches_are_even(case: Case) -> None:
    loaders = [case.loader(ours, rank) for rank in range(case.world)]
    ranks = [read(loader) for loader in loaders]
    if not (case.split and not case.even and not case.drop_last):  # the last batch may be too short for all ranks
        assert [len(batches) for batches in ranks] == [len(loader) for loader in loaders]
    if case.even or case.drop_last:
        assert len({len(batches) for batches in ranks}) == 1
        assert len({len(batch) for batches in ranks for batch in batches}) <= 1 or case.world == 1
    for loader in loaders:
        assert loader.total_batch_size == case.in_all
        assert loader.total_dataset_length == case.length


@given(CASES)
@settings(max_examples=250, deadline=None)
def test_the_last_global_batch_cut_to_its_remainder_has_each_sample_once(case: Case) -> None:
    """What `gather_for_metrics` relies on."""
    if not case.even:
        return
    seen: list[int] = []
    last: list[int] = []
    remainder = 0
    for rank in range(case.world):
        state = GradientState()
        for batch in case.loader(ours, rank):
            if state.end_of_dataloader:
                last += batch.tolist()
                remainder = state.remainder
            else:
                seen += batch.tolist()
    real = last[:remainder] if remainder > 0 else last
    drawn = seen + real
    assert len(set(drawn)) == len(drawn)
    if not case.drop_last:
        assert set(drawn) == set(range(case.length))


@given(CASES, st.integers(0, 12))
@settings(max_examples=250, deadline=None)
def test_skipping_leaves_the_rest_of_the_same_epoch(case: Case, skipped: int) -> None:
    for rank in range(case.world):
        whole = read(case.loader(ours, rank))
        assert read(ours.skip_first_batches(case.loader(ours, rank), skipped)) == whole[skipped:]


@given(CASES)
@settings(max_examples=150, deadline=None)
def test_ranks_draw_what_accelerate_gives_them(case: Case) -> None:
    assert case.drawn() == case.drawn(theirs)


@given(CASES)
@settings(max_examples=150, deadline=None)
def test_a_stream_is_dealt_out_in_order_and_filled_from_its_beginning(case: Case) -> None:
    loaders = [case.loader(ours, rank, Stream(case.length)) for rank in range(case.world)]
    rounds = list(zip_longest(*map(read, loaders), fillvalue=[]))
    together = [number for parts in rounds for part in parts for number in part]
    rest = case.length % case.in_all
    if case.drop_last:
        assert together == list(range(case.length - rest))
    elif case.world == 1:
        assert together == list(range(case.length))
    else:
        assert together[: case.length] == list(range(case.length))
        assert len(together) == case.length + (-case.length % case.in_all)
        beginning = list(range(min(case.in_all, case.length)))
        assert set(together[case.length :]) <= set(beginning)
