from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import accelerate.data_loader as theirs
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from tests.data_loader.sources import Batches, EpochStream, Numbers, SizedStream, Stream, read
from zeroaccel import data_loader as ours
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.state import GradientState

WORLDS = [(world, rank) for world in (1, 2, 3) for rank in range(world)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def shuffled(length: int, size: int, drop_last: bool) -> DataLoader[Any]:
    return DataLoader(Numbers(length), size, shuffle=True, drop_last=drop_last, generator=seeded())


def batch_sampled(length: int, size: int, drop_last: bool) -> DataLoader[Any]:
    sampler = SubsetRandomSampler(range(length), generator=seeded())
    return DataLoader(Numbers(length), batch_sampler=BatchSampler(sampler, size, drop_last))


def batches_as_sampler(length: int, size: int, drop_last: bool) -> DataLoader[Any]:
    sampler = BatchSampler(RandomSampler(range(length), generator=seeded()), size, drop_last)
    return DataLoader(Numbers(length), batch_size=None, sampler=sampler)


# Name -> (loader of (length, batch size, drop_last), options of prepare_data_loader).
SAME: dict[str, tuple[Callable[[int, int, bool], DataLoader[Any]], dict[str, Any]]] = {
    "in order": (lambda n, size, drop: DataLoader(Numbers(n), size, drop_last=drop), {}),
    "in order, uneven": (lambda n, size, drop: DataLoader(Numbers(n), size, drop_last=drop), {"even_batches": False}),
    "in order, split": (lambda n, size, drop: DataLoader(Numbers(n), size, drop_last=drop), {"split_batches": True}),
    "shuffled": (shuffled, {"rng_types": ["generator"]}),
    "shuffled, split": (shuffled, {"rng_types": ["generator"], "split_batches": True}),
    "shuffled by a seed": (shuffled, {"use_seedable_sampler": True, "data_seed": 3}),
    "batch sampler": (batch_sampled, {"rng_types": ["generator"]}),
    "batch sampler as sampler": (batches_as_sampler, {"rng_types": ["generator"]}),
    "stream": (lambda n, size, drop: DataLoader(Stream(n), size, drop_last=drop), {}),
    "stream, split": (lambda n, size, drop: DataLoader(Stream(n), size, drop_last=drop), {"split_batches": True}),
    "stream with epochs": (lambda n, size, drop: DataLoader(EpochStream(n), size, drop_last=drop), {}),
}


@pytest.mark.parametrize("name", SAME)
def test_two_epochs_are_those_of_accelerate(name: str) -> None:
    make, options = SAME[name]
    for length, size, drop_last, (world, rank) in product((0, 1, 5, 11, 24), (1, 4, 6), (False, True), WORLDS):
        if options.get("split_batches") and size % world:
            continue
        if length == 0 and make in (shuffled, batches_as_sampler):
            continue  # PyTorch refuses to shuffle nothing
        if world == 1 and make is batches_as_sampler:
            continue  # Accelerate crashes
        arguments = {"num_processes": world, "process_index": rank, **options}
        case = (length, size, drop_last, arguments)
        mine, other = (
            library.prepare_data_loader(make(length, size, drop_last), **copy.deepcopy(arguments))
            for library in (ours, theirs)
        )
        assert [read(mine), read(mine)] == [read(other), read(other)], case
        mine.set_epoch(7)
        other.set_epoch(7)
        assert read(mine) == read(other), case
        assert read(ours.skip_first_batches(mine, 1)) == read(theirs.skip_first_batches(other, 1)), case
        if "stream" not in name:
            assert len(mine) == len(other), case
            assert mine.total_batch_size == other.total_batch_size, case
            assert mine.total_dataset_length == other.total_dataset_length, case


class ItemBatches(Numbers):
    """Every item is a batch of one."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.tensor([index])


# Accelerate loses the sampler in a world of one, and crashes in a larger one.
@pytest.mark.parametrize(
    ("world", "options", "batches"),
    [
        (1, {}, [[[2], [0], [1]]]),
        (2, {}, [[[2], [1]], [[0], [2]]]),
        (2, {"even_batches": False}, [[[2], [1]], [[0]]]),
        (1, {"dispatch_batches": True, "put_on_device": True}, [[[2], [0], [1]]]),
    ],
)
def test_a_loader_without_batch_size_hands_out_items(
    world: int, options: dict[str, Any], batches: list[list[list[int]]]
) -> None:
    made = [
        ours.prepare_data_loader(
            DataLoader(ItemBatches(3), batch_size=None, sampler=[2, 0, 1]),
            num_processes=world,
            process_index=rank,
            **options,
        )
        for rank in range(world)
    ]
    assert [read(loader) for loader in made] == batches
    assert [len(loader) for loader in made] == [len(each) for each in batches]
    assert read(ours.skip_first_batches(made[0], 1)) == batches[0][1:]


@pytest.mark.parametrize("world", [1, 2])
def test_items_are_shuffled_by_a_seed_too(world: int) -> None:
    def orders(seed: int) -> list[int]:
        loader = DataLoader(ItemBatches(8), batch_size=None, shuffle=True)
        made = [
            ours.prepare_data_loader(
                loader, num_processes=world, process_index=rank, use_seedable_sampler=True, data_seed=seed
            )
            for rank in range(world)
        ]
        return [number for one in made for [number] in read(one)]

    assert sorted(orders(1)) == list(range(8))
    assert orders(1) == orders(1) != orders(2)


def test_a_batch_sampler_as_sampler_is_kept_in_a_world_of_one() -> None:
    """Where Accelerate crashes."""
    assert read(ours.prepare_data_loader(batches_as_sampler(8, 3, False))) == read(batches_as_sampler(8, 3, False))


def test_a_batch_sampler_as_sampler_follows_the_seed_as_any_other() -> None:
    """Accelerate's goes on drawing from the generator of each rank."""
    options: dict[str, Any] = {"num_processes": 2, "process_index": 1, "use_seedable_sampler": True, "data_seed": 3}
    as_sampler, usual = (
        ours.prepare_data_loader(make(9, 2, False), **options) for make in (batches_as_sampler, shuffled)
    )
    assert read(as_sampler) == read(usual)


def test_batches_of_a_stream_are_dealt_out_whole() -> None:
    loader = DataLoader(Stream(3), batch_size=None)
    assert [read(ours.prepare_data_loader(loader, num_processes=2, process_index=rank)) for rank in (0, 1)] == [
        [[0], [2]],
        [[1], [0]],
    ]


def worker_init(worker: int) -> None:
    pass


def test_workers_and_memory_options_are_kept() -> None:
    options: dict[str, Any] = {
        "num_workers": 2,
        "persistent_workers": True,
        "prefetch_factor": 3,
        "pin_memory": True,
        "timeout": 5.0,
        "worker_init_fn": worker_init,
        "collate_fn": torch.stack,
        "multiprocessing_context": "fork",
        "in_order": False,
    }
    made: Any = ours.prepare_data_loader(DataLoader(Numbers(8), 2, **options), num_processes=2, process_index=0)
    for name, value in options.items():
        kept = getattr(made, name)
        assert (kept.get_start_method() if name == "multiprocessing_context" else kept) == value, name
    assert ours.skip_first_batches(made, 1).num_workers == 2


def test_persistent_workers_serve_the_next_epoch_after_a_break() -> None:
    loader = DataLoader(Numbers(12), 2, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    made = ours.prepare_data_loader(loader, num_processes=2, process_index=1)
    for _ in made:
        break
    assert read(made) == [[2, 3], [6, 7], [10, 11]]


@pytest.fixture
def prepared() -> Any:
    return ours.prepare_data_loader(DataLoader(Numbers(7), 2), num_processes=2, process_index=0)


def test_the_last_batch_is_known_before_it_is_yielded(prepared: Any) -> None:
    state = GradientState()
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (False, False, -1)
    seen = [(state.in_dataloader, state.end_of_dataloader, state.remainder) for _ in prepared]
    assert seen == [(True, False, 3), (True, True, 3)]
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (False, False, -1)
    assert state.batches_drawn == 2


def test_a_loader_that_was_left_early_is_no_longer_active_and_begins_anew(prepared: Any) -> None:
    state = GradientState()
    for _ in prepared:
        break
    assert state.active_dataloader is None
    with pytest.raises(ZeroDivisionError):
        all(1 // 0 for _ in prepared)
    assert read(prepared) == [[0, 1], [4, 5]]
    assert state.active_dataloader is None


def test_a_new_iterator_stays_active_when_an_older_one_is_let_go(prepared: Any) -> None:
    older = iter(prepared)
    next(older)
    newer = iter(prepared)
    next(newer)
    del older
    assert GradientState().active_dataloader is prepared


def test_the_inner_of_two_nested_loaders_is_active(prepared: Any) -> None:
    state = GradientState()
    inner = ours.prepare_data_loader(DataLoader(Numbers(4), 2), num_processes=2, process_index=0)
    order = []
    for _ in prepared:
        order.append((state.active_dataloader is prepared, state.end_of_dataloader))
        for _ in inner:
            order.append((state.active_dataloader is inner, state.end_of_dataloader))
        order.append((state.active_dataloader is prepared, state.end_of_dataloader))
    outer_first, outer_last, inner_last = (True, False), (True, True), (True, True)
    assert order == [outer_first, inner_last, outer_first, outer_last, inner_last, outer_last]


def test_an_epoch_that_was_left_early_is_repeated_and_a_whole_one_is_not() -> None:
    loader: Any = ours.prepare_data_loader(shuffled(16, 2, False), use_seedable_sampler=True, data_seed=1)
    first = read(loader)
    for _ in loader:
        break
    second = read(loader)
    third = read(loader)
    assert first != second != third
    loader.set_epoch(1)
    assert read(loader) == second
    assert sorted(number for batch in third for number in batch) == list(range(16))


def test_the_rest_of_an_interrupted_epoch_keeps_its_order() -> None:
    loader: Any = ours.prepare_data_loader(shuffled(16, 2, False), use_seedable_sampler=True, data_seed=1)
    loader.set_epoch(3)
    whole = read(loader)
    loader.set_epoch(3)
    rest = ours.skip_first_batches(ours.skip_first_batches(loader, 2), 1)
    assert read(rest) == whole[3:]
    assert len(rest) == len(whole) - 3
    assert read(loader) == whole, "the loader itself stays as it is"


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("dataset", [Numbers(9), SizedStream(9)])
def test_skipping_twice_adds_up(dataset: Any, dispatch: bool) -> None:
    made = ours.prepare_data_loader(DataLoader(dataset, 2), put_on_device=True, dispatch_batches=dispatch)
    rest = ours.skip_first_batches(ours.skip_first_batches(made, 2), 1)
    assert read(rest) == [[6, 7], [8]]
    assert len(rest) == 2


@pytest.mark.parametrize("dataset", [Numbers(9), Stream(9)])
def test_a_loader_that_was_not_prepared_can_skip(dataset: Any) -> None:
    assert read(ours.skip_first_batches(DataLoader(dataset, 4), 1)) == [[4, 5, 6, 7], [8]]


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_prepared_loader_can_be_pickled(dispatch: bool) -> None:
    made = ours.prepare_data_loader(
        DataLoader(Numbers(6), 2, shuffle=True, generator=seeded()), put_on_device=True, dispatch_batches=dispatch
    )
    twin = pickle.loads(pickle.dumps(made))
    assert type(twin) is type(made)
    assert read(twin) == read(made)
    assert twin.gradient_state.__dict__ is GradientState().__dict__


def test_batches_go_to_the_device_only_where_asked() -> None:
    device = torch.device("meta")
    loader = DataLoader(Numbers(4), 2)
    moved = ours.prepare_data_loader(loader, device, put_on_device=True)
    left = ours.prepare_data_loader(loader, device)
    assert [next(iter(made)).device.type for made in (moved, left)] == ["meta", "cpu"]


def test_the_list_of_generator_types_is_not_changed() -> None:
    rng_types: list[Any] = ["generator"]
    ours.prepare_data_loader(DataLoader(Stream(4)), num_processes=2, process_index=0, rng_types=rng_types)
    assert rng_types == ["generator"]


REFUSED: dict[str, tuple[Callable[[], DataLoader[Any]], dict[str, Any], type[Exception], str]] = {
    "split 3 over 2": (
        lambda: DataLoader(Numbers(9), 3),
        {"split_batches": True},
        ConfigError,
        "batch size is 3: use a multiple of 2",
    ),
    "split 1 over 2": (
        lambda: DataLoader(Stream(9), 1),
        {"split_batches": True},
        ConfigError,
        "batch size is 1: use a multiple of 2",
    ),
    "split an unknown size": (
        lambda: DataLoader(Numbers(9), batch_sampler=Batches([[0]])),
        {"split_batches": True},
        ConfigError,
        r"Batches\) has one: give the batch sampler a batch_size",
    ),
    "dispatch without moving": (
        lambda: DataLoader(Numbers(9)),
        {"dispatch_batches": True},
        ConfigError,
        "needs device_placement=True",
    ),
    "a device mesh": (
        lambda: DataLoader(Numbers(9)),
        {"torch_device_mesh": object()},
        UnsupportedError,
        "tensor parallelism",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    make, options, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        ours.prepare_data_loader(make(), num_processes=2, process_index=0, **options)


def test_a_batch_sampler_that_decides_alone_has_no_sampler_to_replace() -> None:
    made: Any = ours.prepare_data_loader(DataLoader(Numbers(2), batch_sampler=Batches([[0], [1]])))
    assert made.get_sampler() is None
    with pytest.raises(ConfigError, match="Batches draws indices without a sampler"):
        made.set_sampler(SequentialSampler(range(2)))


def test_a_sampler_is_replaced_behind_the_shard() -> None:
    made: Any = ours.prepare_data_loader(DataLoader(Numbers(4), 1), num_processes=2, process_index=0)
    made.set_sampler([3, 2, 1, 0])
    assert read(made) == [[3], [1]]


@pytest.mark.parametrize(
    ("dataset", "workers", "remainder"),
    [(Stream(5), 0, 1), (SizedStream(5), 1, 1), (Stream(5), 1, -1), (SizedStream(5), 2, -1)],
)
def test_the_remainder_of_a_stream_is_unknown_where_workers_fill_up_their_parts(
    dataset: Any, workers: int, remainder: int
) -> None:
    loader = DataLoader(dataset, 2, num_workers=workers, multiprocessing_context="fork" if workers else None)
    made = ours.prepare_data_loader(loader, num_processes=2, process_index=0)
    assert [GradientState().remainder for _ in made][-1] == remainder


def test_a_last_batch_smaller_than_the_world_gives_every_rank_a_sample() -> None:
    """Accelerate gives the later of four ranks none."""
    made: Any = ours.prepare_data_loader(DataLoader(Stream(1)), put_on_device=True)
    batch = torch.tensor([5])
    for rank in range(4):
        made.state = SimpleNamespace(num_processes=4, process_index=rank)
        assert made._own(batch, first=batch, last=True).tolist() == [5]
    assert made.remainder == 1
