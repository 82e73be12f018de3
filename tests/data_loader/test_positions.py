"""An epoch that was interrupted goes on where it was, in the same order, after any number of interruptions."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain, product
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from tests.data_loader.sources import Batches, EpochStream, Numbers, Stream, read
from zeroaccel.data_loader import DataLoaderShard, prepare_data_loader, skip_first_batches
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.state import GradientState

Maker = Callable[[], DataLoader[Any]]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


class NoisyStream(Stream):
    """Its order comes from a generator that the loader seeds by the epoch."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.generator = torch.Generator()

    def __iter__(self) -> Any:
        yield from torch.randperm(self.length, generator=self.generator)


SEED = {"use_seedable_sampler": True}
DISPATCH = {"dispatch_batches": True, "put_on_device": True}
# Name -> (the script's loader, options of prepare_data_loader).
LOADERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "in order": (lambda: DataLoader(Numbers(23), 2), {}),
    "uneven": (lambda: DataLoader(Numbers(23), 2), {"even_batches": False}),
    "dropping": (lambda: DataLoader(Numbers(23), 2, drop_last=True), {}),
    "split": (lambda: DataLoader(Numbers(23), 4), {"split_batches": True}),
    "shuffled": (lambda: DataLoader(Numbers(23), 2, shuffle=True, generator=seeded()), {"rng_types": ["generator"]}),
    "shuffled simply": (lambda: DataLoader(Numbers(23), 2, shuffle=True), {}),
    "shuffled by a seed": (lambda: DataLoader(Numbers(23), 2, shuffle=True), SEED),
    "batch sampler": (lambda: DataLoader(Numbers(9), batch_sampler=Batches([[0], [1, 2], [3], [4, 5, 6], [7, 8]])), {}),
    "items": (lambda: DataLoader(Numbers(9), batch_size=None, sampler=[4, 0, 7, 1, 2, 8]), {}),
    "workers": (
        lambda: DataLoader(
            *(Numbers(12), 2, True),
            generator=seeded(),
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context="fork",
        ),
        {"rng_types": ["generator"]},
    ),
    "stream": (lambda: DataLoader(Stream(23), 2), {}),
    "stream with epochs": (lambda: DataLoader(EpochStream(11), 2), {}),
    "shuffling stream": (lambda: DataLoader(NoisyStream(11), 2), {}),
    "batches of a stream": (lambda: DataLoader(Stream(9), batch_size=None), {}),
}
ALONE: dict[str, tuple[Maker, dict[str, Any]]] = {
    "sampler without a generator": (
        lambda: DataLoader(Numbers(9), batch_sampler=BatchSampler(RandomSampler(range(9)), 2, False)),
        {},
    ),
    "dispatched": (lambda: DataLoader(Numbers(23), 2, shuffle=True), DISPATCH),
    "dispatched stream": (lambda: DataLoader(Stream(23), 2), DISPATCH),
}
CASES = [
    *((name, world, rank) for name, (world, rank) in product(LOADERS, [(1, 0), (2, 0), (2, 1)])),
    *((name, 1, 0) for name in ALONE),
]


def prepared(name: str, world: int, rank: int, stateful: bool = True) -> Any:
    make, options = {**LOADERS, **ALONE}[name]
    options = {**options, "use_stateful_dataloader": stateful}
    if not options.get("dispatch_batches"):
        options |= {"num_processes": world, "process_index": rank}
    return prepare_data_loader(make(), **options)


def stored(loader: Any) -> Any:
    """The loader's state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draw(loader: Any, count: int) -> tuple[list[list[int]], Any]:
    """The first batches of the next epoch, and the state that is taken in the last one's turn."""
    found = []
    for batch in loader:
        found.append(batch.reshape(-1).tolist())
        if len(found) == count:
            return found, stored(loader)
    return found, stored(loader)


@pytest.mark.parametrize(("name", "world", "rank"), CASES)
def test_an_epoch_goes_on_where_it_was_interrupted_and_again(name: str, world: int, rank: int) -> None:
    torch.manual_seed(3)
    whole = prepared(name, world, rank)
    epochs = [read(whole) for _ in range(3)]
    torch.manual_seed(3)
    first = prepared(name, world, rank)
    assert read(first) == epochs[0]
    begin, state = draw(first, 1)
    torch.manual_seed(4)  # another process
    second = prepared(name, world, rank)
    second.load_state_dict(state)
    assert stored(second)["batches"] == 1, "it stands where it was loaded to"
    more, state = draw(second, 1)
    third = prepared(name, world, rank)
    third.load_state_dict(state)
    assert begin + more + read(third) == epochs[1]
    if name not in ALONE:  # whose next epoch depends on PyTorch's generator, which a checkpoint restores by itself
        assert read(third) == epochs[2]


@pytest.mark.parametrize(("name", "world", "rank"), CASES)
def test_without_a_stateful_loader_the_script_skips_and_sees_the_same(name: str, world: int, rank: int) -> None:
    torch.manual_seed(3)
    whole = prepared(name, world, rank, stateful=False)
    expected = read(whole)
    torch.manual_seed(3)
    begin, state = draw(prepared(name, world, rank, stateful=False), 2)
    torch.manual_seed(4)
    by_hand = prepared(name, world, rank, stateful=False)
    by_hand.load_state_dict(state)
    assert read(by_hand) == expected
    resumed = prepared(name, world, rank, stateful=False)
    resumed.load_state_dict(state)
    rest = skip_first_batches(resumed, state["batches"])
    more, state = draw(rest, 1)
    assert begin + more == expected[:3]
    assert state["batches"] == stored(resumed)["batches"] == 3, "a checkpoint asks the loader, not the rest"
    again = prepared(name, world, rank, stateful=False)
    again.load_state_dict(stored(resumed))
    assert read(skip_first_batches(again, 3)) == expected[3:]


@pytest.mark.parametrize("name", ["in order", "split", "shuffled by a seed", "shuffled", "uneven", "shuffled simply"])
@pytest.mark.parametrize("worlds", [(2, 1, 4), (4, 2, 1), (1, 2, 4), (4, 1, 2)])
def test_on_another_number_of_ranks_the_rest_is_seen_once(name: str, worlds: tuple[int, ...]) -> None:
    state, seen = None, []
    for world in worlds:
        found, states = [], []
        for rank in range(world):
            torch.manual_seed(7)  # which real ranks agree on
            loader = prepared(name, world, rank)
            if state is not None:
                loader.load_state_dict(state)
            drawn, after = draw(loader, 100 if world == worlds[-1] else 1)
            found.append(drawn)
            states.append(after)
        seen += [number for drawn in found for batch in drawn for number in batch]
        state = states[0]
        assert all(one["read"] == state["read"] for one in states)
    assert set(seen) == set(range(23))
    if name == "uneven":
        assert len(seen) == 23
    assert len(seen) - 23 <= 2 * worlds[-1], "no more than what fills up the last batch"


@pytest.mark.parametrize(("size", "drawn"), [(4, 3), (1, 12), (6, 2)])
def test_with_another_batch_size_the_rest_is_the_same_where_it_divides(size: int, drawn: int) -> None:
    _, state = draw(prepare_data_loader(DataLoader(Numbers(24), 2), num_processes=2, process_index=0), 3)
    other = prepare_data_loader(DataLoader(Numbers(24), size), use_stateful_dataloader=True)
    other.load_state_dict(state)  # type: ignore[attr-defined]
    assert stored(other)["batches"] == drawn
    assert list(chain.from_iterable(read(other))) == list(range(12, 24))


def test_a_state_behind_the_last_batch_ends_the_epoch_and_no_other() -> None:
    loader = prepared("shuffled by a seed", 1, 0)
    whole = len(loader)
    _, state = draw(loader, whole)
    resumed = prepared("shuffled by a seed", 1, 0)
    resumed.load_state_dict(state)
    assert read(resumed) == []
    assert len(read(resumed)) == whole
    assert stored(resumed)["epoch"] == 2


def test_a_state_between_two_epochs_is_the_beginning_of_the_next() -> None:
    loader = prepared("shuffled", 1, 0)
    read(loader)
    state = stored(loader)
    assert (state["epoch"], state["batches"]) == (1, 0)
    resumed = prepared("shuffled", 1, 0)
    resumed.load_state_dict(state)
    assert read(resumed) == read(loader)


def test_what_is_fetched_ahead_does_not_count_as_drawn() -> None:
    loader = prepared("workers", 2, 1)
    for number, _ in enumerate(loader, 1):
        assert stored(loader)["batches"] == number
        assert stored(loader)["read"] == 2 * number


def test_several_loaders_go_on_each_where_it_was() -> None:
    names = ["shuffled by a seed", "stream"]

    def pairs(loaders: list[Any], count: int) -> tuple[list[Any], list[Any]]:
        found: list[Any] = []
        for pair in zip(*loaders, strict=False):
            found.append([batch.tolist() for batch in pair])
            if len(found) == count:
                break
        return found, [stored(loader) for loader in loaders]

    whole, _ = pairs([prepared(name, 1, 0) for name in names], 100)
    begin, states = pairs([prepared(name, 1, 0) for name in names], 4)
    resumed = [prepared(name, 1, 0) for name in names]
    for loader, state in zip(resumed, states, strict=True):
        loader.load_state_dict(state)
    assert begin + pairs(resumed, 100)[0] == whole


def test_another_epoch_than_the_loaded_one_begins_at_its_beginning() -> None:
    loader = prepared("shuffled by a seed", 1, 0)
    epochs = [read(loader) for _ in range(3)]
    loader.set_epoch(1)
    _, state = draw(loader, 3)
    resumed = prepared("shuffled by a seed", 1, 0)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert read(resumed) == epochs[2]


def test_the_end_of_a_resumed_epoch_is_known() -> None:
    _, state = draw(prepared("in order", 2, 0), 5)
    resumed = prepared("in order", 2, 0)
    resumed.load_state_dict(state)
    ends = [(GradientState().end_of_dataloader, GradientState().remainder) for _ in resumed]
    assert ends == [(True, 3)]


def test_a_loader_made_by_its_constructor_keeps_its_position() -> None:
    first, second = (DataLoaderShard(Numbers(8), batch_size=2, use_stateful_dataloader=True) for _ in range(2))
    _, state = draw(first, 1)
    second.load_state_dict(state)
    assert read(second) == [[2, 3], [4, 5], [6, 7]]


def test_the_position_is_named_where_the_script_has_to_skip(caplog: pytest.LogCaptureFixture) -> None:
    _, state = draw(prepared("in order", 2, 0, stateful=False), 3)
    with caplog.at_level("INFO", logger="zeroaccel"):
        prepared("in order", 2, 0, stateful=False).load_state_dict(state)
    assert "stands at batch 3 of epoch 0: skip_first_batches(loader, 3)" in caplog.text


def of_batch_size(size: int, dataset: Any = None) -> Any:
    loader: Any = DataLoader(dataset or Numbers(24), size)
    return prepare_data_loader(loader, num_processes=1, process_index=0, use_stateful_dataloader=True)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "a stream on another world": (
        lambda: of_batch_size(2, Stream(24)),
        {"world_size": 2},
        UnsupportedError,
        r"batch 3 with world size 2, .* with world size 1, .*: resume with the same, or load \{\*\*state, 'batches': 0",
    ),
    "a stream with another batch size": (lambda: of_batch_size(4, Stream(24)), {}, UnsupportedError, "batch size 2"),
    "a batch size that does not divide": (
        lambda: of_batch_size(4),
        {},
        ConfigError,
        "6 samples .* in batches of 2; batches of 4 .*: use a batch size that divides 6",
    ),
    "another sampler": (
        lambda: DataLoaderShard(
            *(Numbers(24),), use_stateful_dataloader=True, sampler=RandomSampler(range(24), generator=seeded())
        ),
        {"batch_size": 1},
        ConfigError,
        "had 0 generators, this one has 1",
    ),
    "something else": (lambda: of_batch_size(2), {"batches": None, "more": 1}, ConfigError, "no state of a prepared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_position_that_cannot_be_taken_up_is_refused(case: str) -> None:
    make, changes, error, text = REFUSED[case]
    dataset = Stream(24) if "stream" in case else Numbers(24)
    sampler = {} if "stream" in case else {"sampler": SequentialSampler(range(24))}
    _, state = draw(prepare_data_loader(DataLoader(dataset, 2, **sampler), use_stateful_dataloader=True), 3)
    with pytest.raises(error, match=text):
        make().load_state_dict({**state, **changes})


def test_a_refused_stream_can_begin_its_epoch_anew() -> None:
    _, state = draw(of_batch_size(2, Stream(24)), 3)
    other = of_batch_size(3, Stream(24))
    other.load_state_dict({**state, "batches": 0, "read": 0})
    assert read(other)[0] == [0, 1, 2]
