"""Tensors between two real ranks; expected values come from the ranks' numbers, not from the library."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from zeroaccel.distributed import operations
from zeroaccel.errors import ConfigError, ConfigTypeError
from zeroaccel.state import GradientState, PartialState

Pair = namedtuple("Pair", ["left", "right"])


class Output(OrderedDict[str, Any]):
    """A mapping whose keys are attributes as well, as models return it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def rank() -> int:
    return PartialState().process_index


# Name -> (what rank r gives, what every rank gets).
GATHERED: dict[str, tuple[Callable[[int], Any], Any]] = {
    "vector": (lambda r: torch.tensor([r, r + 10]), torch.tensor([0, 10, 1, 11])),
    "matrix": (lambda r: torch.full((1, 2), float(r)), torch.tensor([[0.0, 0.0], [1.0, 1.0]])),
    "no dimension": (lambda r: torch.tensor(float(r)), torch.tensor([0.0, 1.0])),
    "bool": (lambda r: torch.tensor([r == 1, True]), torch.tensor([False, True, True, True])),
    "bfloat16": (lambda r: torch.tensor([r], dtype=torch.bfloat16), torch.tensor([0, 1], dtype=torch.bfloat16)),
    "half": (lambda r: torch.tensor([r], dtype=torch.float16), torch.tensor([0, 1], dtype=torch.float16)),
    "uint8": (lambda r: torch.tensor([r], dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.uint8)),
    "not contiguous": (lambda r: torch.arange(4).view(2, 2).t() + r, torch.tensor([[0, 2], [1, 3], [1, 3], [2, 4]])),
    "with gradient": (lambda r: torch.tensor([float(r)], requires_grad=True) * 2, torch.tensor([0.0, 2.0])),
    "no element": (lambda r: torch.zeros(0, 3), torch.zeros(0, 3)),
    "list": (lambda r: [torch.tensor([r]), (torch.tensor([-r]),)], [torch.tensor([0, 1]), (torch.tensor([0, -1]),)]),
    "named tuple": (
        lambda r: Pair(torch.tensor([r]), {"x": torch.tensor(r)}),
        Pair(torch.tensor([0, 1]), {"x": torch.tensor([0, 1])}),
    ),
    "model output": (lambda r: Output(logits=torch.tensor([r])), Output(logits=torch.tensor([0, 1]))),
    "user dict": (lambda r: UserDict(x=torch.tensor([r])), UserDict(x=torch.tensor([0, 1]))),
    "default dict": (
        lambda r: defaultdict(list, x=torch.tensor([r])),
        defaultdict(list, x=torch.tensor([0, 1])),
    ),
    "nothing": (lambda r: [], []),
}


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif hasattr(expected, "items"):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    else:
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)


def gather_all() -> None:
    for name, (given, expected) in GATHERED.items():
        data = given(rank())
        found = operations.gather(data)
        with torch.no_grad():
            try:
                assert_same(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {found}") from error


def test_gather_joins_in_order_of_rank_and_keeps_containers(ranks: RankPool) -> None:
    ranks.run(gather_all)


# (reduction, what rank r gives, result)
REDUCED: list[tuple[str, Callable[[int], torch.Tensor], torch.Tensor]] = [
    ("sum", lambda r: torch.tensor([r + 1, 5]), torch.tensor([3, 10])),
    ("sum", lambda r: torch.tensor(r + 1.0), torch.tensor(3.0)),
    ("mean", lambda r: torch.tensor([r + 1.0, 5.0]), torch.tensor([1.5, 5.0])),
    ("mean", lambda r: torch.tensor([r + 1, 5]), torch.tensor([1.5, 5.0])),
    ("mean", lambda r: torch.tensor([r], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.bfloat16)),
    ("max", lambda r: torch.tensor([r, -r]), torch.tensor([1, 0])),
    ("sum", lambda r: torch.arange(4).view(2, 2).t() + r, torch.tensor([[1, 5], [3, 7]])),
]


def reduce_all() -> None:
    for reduction, given, expected in REDUCED:
        data = given(rank())
        untouched = data.clone()
        assert_same(operations.reduce({"x": [data]}, reduction), {"x": [expected]})
        assert_same(data, untouched)
    assert_same(operations.reduce(torch.tensor([rank()]), "none"), torch.tensor([rank()]))
    assert operations.reduce(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0], "mean is the default"


def test_reduce_combines_element_by_element_and_leaves_its_argument(ranks: RankPool) -> None:
    """The mean of integers is a float; Accelerate fails there."""
    ranks.run(reduce_all)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduction='median' is unknown: write 'mean', 'sum', 'max' or 'none'"):
        operations.reduce(torch.tensor(1.0), "median")


def broadcast_all() -> None:
    for source in (0, 1):
        data = {"x": torch.tensor([rank()]), "y": (torch.arange(4).view(2, 2).t() * rank(), torch.tensor(rank() > 0))}
        found = operations.broadcast(data, from_process=source)
        expected = {
            "x": torch.tensor([source]),
            "y": (torch.arange(4).view(2, 2).t() * source, torch.tensor(source > 0)),
        }
        assert_same(found, expected)
        assert found["x"] is data["x"], "in place"


def test_broadcast_overwrites_with_the_tensors_of_one_rank(ranks: RankPool) -> None:
    ranks.run(broadcast_all)


def copy_from_each_rank() -> None:
    for source in (0, 1):
        given = torch.arange(6).view(2, 3) if rank() == source else None
        assert_same(operations.copy_tensor_to_devices(given), torch.arange(6).view(2, 3))


def test_a_tensor_of_one_rank_is_copied_to_all(ranks: RankPool) -> None:
    ranks.run(copy_from_each_rank)


# (arguments, what rank r gives, what rank r gets)
PADDED: list[tuple[dict[str, Any], Callable[[int], Any], Callable[[int], Any]]] = [
    ({}, lambda r: torch.ones(r + 1), lambda r: torch.tensor([1.0, float(r)])),
    ({"pad_index": 7}, lambda r: torch.ones(2 - r).long(), lambda r: torch.tensor([1, 7 if r else 1])),
    ({"pad_first": True}, lambda r: torch.ones(r + 1), lambda r: torch.tensor([float(r), 1.0])),
    ({"dim": 1}, lambda r: torch.ones(1, r + 1), lambda r: torch.tensor([[1.0, float(r)]])),
    ({"dim": -1}, lambda r: torch.ones(1, r + 1), lambda r: torch.tensor([[1.0, float(r)]])),
    ({"dim": 1}, lambda r: torch.ones(3), lambda r: torch.ones(3)),
    ({}, lambda r: torch.tensor(2), lambda r: torch.tensor(2)),
    (
        {},
        lambda r: {"x": [torch.ones(r + 1), torch.ones(1)]},
        lambda r: {"x": [torch.tensor([1.0, float(r)]), torch.ones(1)]},
    ),
]


def pad_all() -> None:
    for arguments, given, expected in PADDED:
        padded = operations.pad_across_processes(given(rank()), **arguments)
        assert_same(padded, expected(rank()))
        operations.gather(padded)


def test_padded_tensors_have_the_largest_size_of_any_rank(ranks: RankPool) -> None:
    ranks.run(pad_all)


# Name -> (call with rank, error, texts in it). Each rank gets the same error, and nobody waits.
REFUSED: dict[str, tuple[Callable[[int], Any], str, list[str]]] = {
    "shapes": (
        lambda r: operations.gather(torch.zeros(2 + r)),
        "DistributedError",
        ["gather was given different things", "rank 0: [2] torch.float32", "rank 1: [3]", "pad_across_processes"],
    ),
    "dtypes": (
        lambda r: operations.reduce(torch.zeros(2, dtype=[torch.float32, torch.int64][r])),
        "DistributedError",
        ["rank 0: [2] torch.float32", "rank 1: [2] torch.int64"],
    ),
    "structures": (
        lambda r: operations.gather([torch.zeros(1)] * (1 + r)),
        "DistributedError",
        ["rank 1: ([1] torch.float32, [1] torch.float32)"],
    ),
    "orders of keys": (
        lambda r: operations.gather({key: torch.zeros(1) for key in ("ab" if r else "ba")}),
        "DistributedError",
        ["rank 0: {'b': [1] torch.float32, 'a'", "rank 1: {'a': [1] torch.float32, 'b'"],
    ),
    "room for a broadcast": (
        lambda r: operations.broadcast(torch.zeros(1 + r)),
        "DistributedError",
        ["broadcast(from_process=0) was given different things", "broadcast_object_list"],
    ),
    "senders of a broadcast": (
        lambda r: operations.broadcast(torch.zeros(1), from_process=r),
        "DistributedError",
        ["rank 0: broadcast(from_process=0)\n  rank 1: broadcast(from_process=1)"],
    ),
    "lengths of lists": (
        lambda r: operations.broadcast_object_list([0] * (1 + r)),
        "DistributedError",
        ["rank 0: a list of 1 from rank 0\n  rank 1: a list of 2 from rank 0"],
    ),
    "numbers of dimensions": (
        lambda r: operations.pad_across_processes(torch.zeros([1] * (1 + r))),
        "DistributedError",
        ["rank 0: 1 dimensions", "rank 1: 2 dimensions"],
    ),
    "an object on one rank": (
        lambda r: operations.gather(torch.zeros(1) if r else "text"),
        "DistributedError",
        ["rank 0: str", "rank 1: [1] torch.float32"],
    ),
    "an object on both": (
        lambda r: operations.gather({"x": "text"}),
        "ConfigTypeError",
        ["but got str", "gather_object"],
    ),
    "two senders": (
        lambda r: operations.copy_tensor_to_devices(torch.zeros(1)),
        "DistributedError",
        ["on exactly one rank", "given by ranks [0, 1]"],
    ),
}


def provoke(name: str) -> tuple[str, str]:
    call = REFUSED[name][0]
    try:
        call(rank())
    except Exception as error:
        # The ranks are still in step: the next collective works.
        assert operations.reduce(torch.tensor(1), "sum").item() == 2
        return type(error).__name__, str(error)
    raise AssertionError(f"{name}: nothing was raised")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_ranks_do_not_agree_on_is_one_error_on_all_of_them(ranks: RankPool, name: str) -> None:
    _, error, texts = REFUSED[name]
    first, second = ranks.run(provoke, name=name, timeout=20.0)
    assert first == second
    assert first[0] == error
    for text in texts:
        assert text in first[1]


def metrics_at_odds() -> list[Any]:
    state = GradientState()
    found = [
        operations.gather_for_metrics(["a", "b"] if rank() else [], state),
        operations.gather_for_metrics([torch.tensor(1)] if rank() else [], state),
        operations.gather_for_metrics([torch.zeros(1 + rank())], state, use_gather_object=True),
    ]
    return [len(each) for each in found]


def test_metrics_of_ranks_without_any_object_do_not_hang(ranks: RankPool) -> None:
    assert ranks.run(metrics_at_odds, timeout=20.0) == [[2, 1, 2]] * 2


def test_one_process_alone_has_nobody_to_ask() -> None:
    tensor = torch.ones(2)
    assert operations.gather(tensor) is tensor
    assert operations.broadcast(tensor) is tensor
    assert operations.pad_across_processes(tensor) is tensor
    assert operations.reduce(tensor, "mean").tolist() == [1.0, 1.0]
    assert operations.copy_tensor_to_devices(tensor).tolist() == [1.0, 1.0]
    with pytest.raises(ConfigTypeError, match="reduce takes nested lists, tuples and mappings of tensors, but got int"):
        operations.reduce({"x": 3})
