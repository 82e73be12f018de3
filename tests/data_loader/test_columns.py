"""Dispatched batches of texts, objects and nested structures, on two ranks and cut by hand."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.data_loader.sources import Stream
from tests.distributed.pool import RankPool
from zeroaccel.data_loader import prepare_data_loader
from zeroaccel.data_loader.columns import batch_size_of, cut, join
from zeroaccel.errors import ConfigError
from zeroaccel.state import PartialState

Pair = namedtuple("Pair", ["x", "y"])


def batch(start: int, size: int) -> dict[str, Any]:
    numbers = range(start, start + size)
    return {
        "x": torch.tensor(list(numbers)),
        "text": [f"text {number}" for number in numbers],
        "nested": Pair((torch.tensor(list(numbers)) * 10,), tuple({"id": number} for number in numbers)),
        "name": "train",
    }


def test_columns_are_joined_and_cut_like_tensors() -> None:
    joined = join([batch(0, 3), batch(3, 2)])
    assert batch_size_of(joined) == 5
    for part in (slice(0, 2), slice(3, 5)):
        assert str(cut(joined, part)) == str(batch(part.start, 2))


def test_a_batch_without_tensors_is_cut_too() -> None:
    joined = join([["a", "b"], ["c"]])
    assert (joined, cut(joined, slice(1, 3))) == (["a", "b", "c"], ["b", "c"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: batch_size_of({"x": 3}), "a batch of type dict holds neither a tensor with a dimension nor a list"),
        (lambda: join([{"x": torch.ones(1), "name": name} for name in "ab"]), "different parts of type str cannot be"),
        (lambda: join([{"x": torch.ones(1)}, {"y": torch.ones(1)}]), "different parts of type dict"),
    ],
)
def test_what_cannot_be_joined_or_cut_is_refused_with_the_remedy(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()


class Samples(IterableDataset[Any]):
    """A number, a text and a nested structure a sample."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            yield {"x": number, "text": f"text {number}", "nested": (torch.full((2,), number), {"id": number})}


def dispatched_samples(length: int, split: bool) -> list[tuple[list[int], list[str], list[int], list[int]]]:
    loader = prepare_data_loader(
        DataLoader(Samples(length), 4 if split else 2), put_on_device=True, split_batches=split
    )
    return [
        (each["x"].tolist(), list(each["text"]), each["nested"][0][:, 0].tolist(), each["nested"][1]["id"].tolist())
        for each in loader
    ]


@pytest.mark.parametrize("split", [False, True])
def test_each_rank_gets_its_texts_with_its_tensors(ranks: RankPool, split: bool) -> None:
    """Accelerate cannot join texts, and gives all of them to every rank where it need not."""
    first, second = ranks.run(dispatched_samples, length=7, split=split)
    for mine, numbers in ((first, [[0, 1], [4, 5]]), (second, [[2, 3], [6, 0]])):
        assert mine == [(each, [f"text {number}" for number in each], each, each) for each in numbers]


class Unpicklable(Stream):
    """Its batches hold a function."""

    def __iter__(self) -> Iterator[Any]:
        yield from ({"x": torch.ones(1), "f": (lambda: 0)} for _ in range(self.length))


def first_of(samples: list[Any]) -> Any:
    return {"x": torch.cat([sample["x"] for sample in samples]), "f": samples[0]["f"]}


def told_of_unpicklable() -> str:
    loader = DataLoader(Unpicklable(4), 4, collate_fn=first_of)
    try:
        list(prepare_data_loader(loader, put_on_device=True, split_batches=True))
    except Exception as error:
        PartialState().wait_for_everyone()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def test_an_object_that_cannot_be_sent_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for text in ranks.run(told_of_unpicklable, timeout=20.0):
        assert text.startswith("DistributedError: ")
        assert "an object in it cannot be pickled" in text
