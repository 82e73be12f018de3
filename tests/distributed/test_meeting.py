"""A collective that a rank misses, or replaces by another one, is an error that names the rank, not a hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed

from tests.distributed.pool import RankPool, free_port
from zeroaccel.distributed import operations
from zeroaccel.distributed.random import synchronize_rng_state
from zeroaccel.state import GradientState, PartialState, meeting

TIMEOUT = 4.0

CALLS: dict[str, Callable[[], object]] = {
    "gather": lambda: operations.gather(torch.ones(1)),
    "reduce": lambda: operations.reduce(torch.ones(1)),
    "broadcast(from_process=0)": lambda: operations.broadcast(torch.ones(1)),
    "pad_across_processes": lambda: operations.pad_across_processes(torch.ones(1)),
    "copy_tensor_to_devices": lambda: operations.copy_tensor_to_devices(None if rank() else torch.ones(1)),
    "gather_object": lambda: operations.gather_object([1]),
    "broadcast_object_list": lambda: operations.broadcast_object_list([1]),
    "gather_for_metrics": lambda: operations.gather_for_metrics(torch.ones(1), GradientState()),
    "wait_for_everyone": lambda: PartialState().wait_for_everyone(),
    "synchronize_rng_state(torch)": lambda: synchronize_rng_state("torch"),
}


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    """Three ranks."""
    pool = RankPool(3)
    yield pool
    pool.close()


def rank() -> int:
    return PartialState().process_index


def begin(port: int) -> None:
    """A process group of this case alone, which may break."""
    os.environ["MASTER_PORT"] = str(port)
    meeting.PATIENCE = 0.5
    PartialState(cpu=True, timeout=timedelta(seconds=TIMEOUT))


def end() -> None:
    torch.distributed.destroy_process_group()
    PartialState._reset_state()


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def missing_from(name: str, leaves: bool, port: int) -> tuple[str, float]:
    """Rank 1 does not come: its connections close, or it sleeps."""
    begin(port)
    since = time.monotonic()
    found = told(CALLS[name]) if rank() != 1 else "away"
    took = time.monotonic() - since
    if not leaves and rank() == 1:
        time.sleep(TIMEOUT + 2)
    end()
    return found, took


@pytest.mark.parametrize("leaves", [False, True], ids=["sleeps", "leaves"])
def test_a_rank_that_does_not_come_is_named_by_all_that_did(three: RankPool, leaves: bool) -> None:
    name = "gather_object" if leaves else "wait_for_everyone"
    first, _, third = three.run(missing_from, name=name, leaves=leaves, port=free_port())
    for text, took in (first, third):
        assert text.startswith(f"DistributedError: {name} must be called by all 3 ranks, and rank 1 did not come")
        assert "behind `if accelerator.is_main_process`" in text
        assert (took < TIMEOUT) if leaves else (TIMEOUT / 2 < took < TIMEOUT + 4)


def late(seconds: float, port: int) -> str:
    begin(port)
    if rank() == 2:
        time.sleep(seconds)
    found = told(PartialState().wait_for_everyone)
    end()
    return found


def test_a_rank_that_is_late_but_in_time_is_waited_for(three: RankPool) -> None:
    assert three.run(late, seconds=1.5, port=free_port()) == ["no error"] * 3


def each_against_the_next(port: int) -> dict[str, str]:
    begin(port)
    names = list(CALLS)
    found = {}
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        found[name] = told(CALLS[other if rank() == 1 else name])
        assert told(CALLS[name]) == "no error", "the ranks are still in step"
    end()
    return found


def test_ranks_that_make_different_calls_are_told_at_once_and_stay_in_step(three: RankPool) -> None:
    first, second, third = three.run(each_against_the_next, port=free_port(), timeout=30.0)
    assert first == second == third
    names = list(CALLS)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        assert first[name].startswith("DistributedError: the ranks are at different places of the script")
        assert f"rank 0: {name}\n  rank 1: {other}\n  rank 2: {name}" in first[name]


def asked() -> list[bool]:
    state = PartialState()
    return [meeting.meet(state, "question", flag=rank() == wanted) for wanted in (0, 1, 7)]


def test_a_question_is_answered_with_yes_if_any_rank_says_so(ranks: RankPool) -> None:
    assert ranks.run(asked) == [[True, True, False]] * 2
