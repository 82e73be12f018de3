"""Finding the batch size that fits; the errors are those that PyTorch really raises, or their recorded texts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.utils.memory as theirs
import pytest
import torch

from zeroaccel.engine import memory as ours
from zeroaccel.errors import ConfigTypeError, EnvironmentProblem


@pytest.fixture(autouse=True)
def _collections_are_quick() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


def _too_big(size: int) -> None:
    """Asks the CPU's allocator for more than there is."""
    torch.empty(2**60 + size, dtype=torch.uint8)


def _tried(finder: Callable[..., Any], fits: int, **options: Any) -> list[int]:
    sizes: list[int] = []

    @finder(**options)
    def train(batch_size: int) -> int:
        sizes.append(batch_size)
        if batch_size > fits:
            _too_big(batch_size)
        return batch_size

    assert train() == sizes[-1]
    assert train() == sizes[-1], "a second call starts with what was found"
    return sizes


@pytest.mark.parametrize(("start", "fits"), [(128, 128), (128, 100), (40, 3), (10, 1)])
def test_the_sizes_tried_are_accelerates(start: int, fits: int) -> None:
    expected = _tried(theirs.find_executable_batch_size, fits, starting_batch_size=start)
    assert _tried(ours.find_executable_batch_size, fits, starting_batch_size=start) == expected


def test_nine_tenths_are_rounded_down_for_every_size() -> None:
    assert [size for size in range(1, 5000) if size * 9 // 10 != int(size * 0.9)] == []


def test_the_next_size_may_come_from_a_function() -> None:
    sizes = iter([50, 20, 7])
    options = {"starting_batch_size": 60, "reduce_batch_size_fn": lambda: next(sizes)}
    assert _tried(ours.find_executable_batch_size, 20, **options) == [60, 50, 20, 20]


def test_no_batch_size_at_all_is_an_error_with_the_range() -> None:
    train = ours.find_executable_batch_size(_too_big, starting_batch_size=3)
    with pytest.raises(EnvironmentProblem, match="no batch size of _too_big fits into memory, from 3 down to 1"):
        train()


def test_other_errors_pass_through_at_once() -> None:
    sizes = []

    @ours.find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int) -> None:
        sizes.append(batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()
    assert sizes == [16]


def test_arguments_reach_the_function_behind_the_batch_size() -> None:
    @ours.find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int, *models: str, epochs: int) -> tuple[Any, ...]:
        """Trains."""
        return batch_size, models, epochs

    assert train("a", "b", epochs=3) == (16, ("a", "b"), 3)
    assert (train.__name__, train.__doc__) == ("train", "Trains.")


def test_a_batch_size_of_the_callers_is_refused() -> None:
    @ours.find_executable_batch_size
    def train(batch_size: int, model: str) -> None: ...

    with pytest.raises(TypeError):
        theirs.find_executable_batch_size(train.__wrapped__)(64, "model")  # type: ignore[attr-defined]
    with pytest.raises(ConfigTypeError, match=r"train cannot be called.*leave out its first parameter, the batch size"):
        train(64, "model")


class _Big:
    """Something that must be gone before the next try."""


def test_what_a_failed_try_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[_Big]] = []

    @ours.find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> None:
        assert all(reference() is None for reference in held)
        big = _Big()
        held.append(weakref.ref(big))
        if batch_size > 6:
            _too_big(batch_size)

    train()
    assert len(held) == 3


TEXTS = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size",
    "out of patience",
    "expected scalar type Half but found Float",
]
ERRORS = [
    *(RuntimeError(text) for text in TEXTS),
    ValueError(TEXTS[0]),
    RuntimeError(),
    RuntimeError(TEXTS[0], 2),
    torch.OutOfMemoryError(TEXTS[0]),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_lack_of_memory_is_recognized_as_accelerate_does(error: Exception) -> None:
    assert ours.should_reduce_batch_size(error) is theirs.should_reduce_batch_size(error)


def test_release_memory_gives_one_none_an_object_and_collects_garbage() -> None:
    one, other, cycle = _Big(), _Big(), _Big()
    cycle.itself = cycle  # type: ignore[attr-defined]
    watched = [weakref.ref(big) for big in (one, other, cycle)]
    del cycle
    one, other = ours.release_memory(one, other)
    assert (one, other) == (None, None)
    assert [reference() for reference in watched] == [None, None, None]
    assert ours.release_memory() == []
