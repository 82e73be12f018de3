from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.pool import RankPool
from zeroaccel.config.types import RNGType
from zeroaccel.distributed import operations
from zeroaccel.distributed.random import set_seed, synchronize_rng_state, synchronize_rng_states
from zeroaccel.errors import ConfigError
from zeroaccel.state import PartialState


def rank() -> int:
    return PartialState().process_index


def gather_objects() -> list[Any]:
    r = rank()
    return [
        operations.gather_object([("rank", r)] * (r + 1)),
        operations.gather_object((r, -r)),
        operations.gather_object({"rank": r}),
        operations.gather_object(f"rank {r}"),
        operations.gather_object(r),
        operations.gather_object([]),
        [tensor.tolist() for tensor in operations.gather_object([torch.full((r + 1,), r)])],
    ]


def test_objects_of_all_ranks_come_as_one_list_in_order_of_rank(ranks: RankPool) -> None:
    """A mapping or a string is one object; Accelerate gives its keys or characters."""
    assert (
        ranks.run(gather_objects)
        == [
            [
                [("rank", 0), ("rank", 1), ("rank", 1)],
                [0, 0, 1, -1],
                [{"rank": 0}, {"rank": 1}],
                ["rank 0", "rank 1"],
                [0, 1],
                [],
                [[0], [1, 1]],
            ]
        ]
        * 2
    )


def broadcast_objects() -> list[Any]:
    found = []
    for source in (0, 1):
        given: list[Any] = [rank(), {"x": rank()}, None]
        result = operations.broadcast_object_list(given, from_process=source)
        assert result is given
        found.append(result)
    return found


def test_a_list_is_overwritten_by_that_of_one_rank(ranks: RankPool) -> None:
    assert ranks.run(broadcast_objects) == [[[0, {"x": 0}, None], [1, {"x": 1}, None]]] * 2


def provoke(broadcasts: bool) -> str:
    unsendable: list[Any] = [(lambda: 0) if rank() == 0 else 0]
    try:
        operations.broadcast_object_list(unsendable) if broadcasts else operations.gather_object(unsendable)
    except Exception as error:
        assert operations.reduce(torch.tensor(1), "sum").item() == 2, "the ranks are still in step"
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("broadcasts", [False, True])
def test_an_object_that_cannot_be_pickled_is_an_error_on_every_rank(ranks: RankPool, broadcasts: bool) -> None:
    first, second = ranks.run(provoke, broadcasts=broadcasts, timeout=20.0)
    assert first == second
    assert first.startswith("DistributedError: an object cannot be pickled")
    assert "rank 0: list:" in first


# --- random states ------------------------------------------------------------------------------------------------


def draw_after_seed(device_specific: bool) -> list[float]:
    set_seed(2**32 + 3, device_specific=device_specific)
    return [random.random(), float(numpy.random.rand()), torch.rand(1).item()]


def test_a_seed_is_the_same_on_all_ranks_unless_it_is_device_specific(ranks: RankPool) -> None:
    same = ranks.run(draw_after_seed, device_specific=False)
    own = ranks.run(draw_after_seed, device_specific=True)
    assert same[0] == same[1] == own[0]
    assert all(one != other for one, other in zip(own[0], own[1], strict=True))


def draw_after_synchronization() -> tuple[list[int], list[int]]:
    torch.manual_seed(rank())
    generator = torch.Generator().manual_seed(rank() + 7)
    before = [int(torch.randint(10**9, (1,))), int(torch.randint(10**9, (1,), generator=generator))]
    synchronize_rng_states(["torch", RNGType.GENERATOR], generator)
    after = [int(torch.randint(10**9, (1,))), int(torch.randint(10**9, (1,), generator=generator))]
    return before, after


def test_synchronized_generators_draw_what_those_of_rank_0_draw(ranks: RankPool) -> None:
    first, second = ranks.run(draw_after_synchronization)
    assert all(one != other for one, other in zip(first[0], second[0], strict=True))
    assert first[1] == second[1]


@pytest.mark.parametrize(
    ("rng_type", "text"),
    [
        ("numpy", "rng_type 'numpy' is unknown: write one of torch, cuda"),
        ("generator", "needs a generator: pass `generator=torch.Generator"),
        ("npu", "a device that this machine does not have: leave it out"),
    ],
)
def test_a_random_state_that_is_not_there_is_refused(rng_type: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        synchronize_rng_state(rng_type)


def test_deterministic_algorithms_are_switched_on_only_where_asked() -> None:
    try:
        set_seed(1)
        assert not torch.are_deterministic_algorithms_enabled()
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
