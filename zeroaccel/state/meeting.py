"""The door of every collective that a script can call: all ranks come in with the same words, or all get an error.

A rank that never comes is named. While a collective goes on nothing is written down; a rank that has waited for a
while signs a list in the process group's store, and when the wait ends in a failure, those who did not sign missed it.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zeroaccel.errors import DistributedError

if TYPE_CHECKING:
    from zeroaccel.state.process import PartialState

PATIENCE = 5.0  # seconds after which a waiting rank signs
EARLIER = 0.95  # of NCCL's timeout, at which its watchdog would end the process without saying who is missing
_numbers = itertools.count(1)  # ranks that are in step count alike
_connected: Any = None  # the group whose ranks have met


def meet(state: PartialState, name: str, outline: str = "", remedy: str = "", flag: bool = False) -> bool:
    """Returns once all ranks are here; costs one exchange of 16 bytes a rank. Collective.

    Args:
        state: of this rank.
        name: function that the script called.
        outline: what it was given, where that has to be the same on all ranks.
        remedy: what the error advises where outlines differ.
        flag: a question to all ranks.

    Returns:
        Whether any rank's `flag` is true.

    Raises:
        DistributedError: on every rank, if names or outlines differ; on those that came, if one did not.
    """
    if state.num_processes == 1:
        return flag
    digest = int.from_bytes(hashlib.blake2b(f"{name} {outline}".encode(), digest_size=8).digest(), "big", signed=True)
    if state.backend != "gloo":
        _connect(state, name)
    own = torch.tensor([digest, flag], device=state.device)
    brought = [torch.empty_like(own) for _ in range(state.num_processes)]
    # On gloo half as long as an all-reduce.
    attend(state, name, lambda: dist.all_gather(brought, own, async_op=True))
    digests, flags = torch.stack(brought).T.tolist()
    if len(set(digests)) > 1:
        said: list[Any] = [None] * state.num_processes
        dist.all_gather_object(said, (name, outline))
        raise DistributedError(_difference(said, remedy))
    return any(flags)


def meet_apart(state: PartialState, name: str, outline: str, remedy: str) -> None:
    """`meet` for ranks that may have come alone, the others being held up in a collective of DeepSpeed.

    So they look for each other in the process group's store first.

    Raises:
        DistributedError: on those that came, if one did not; on every rank, if names or outlines differ.
    """
    if state.num_processes == 1:
        return
    number, begin = next(_numbers), time.monotonic()
    try:
        _sign(state, number)
        absent = _absent_apart(state, number)
        waited = time.monotonic() - begin
        if absent:
            _wait_for_readers(state, number, absent)
    except RuntimeError as problem:
        raise DistributedError(f"{name}: {_fell_apart(state, time.monotonic() - begin)}") from problem
    if absent:
        raise DistributedError(
            f"{name}: rank {state.process_index} is at {outline}, and {_ranks(absent)} did not come there in"
            f" {waited:.0f} s. Either it failed, then its own error says why, or it went another way:"
            f" {remedy}"
        )
    meet(state, name, outline, remedy)


def _absent_apart(state: PartialState, number: int) -> list[int]:
    """Ranks that do not come in time. One question to the store at a time, of however many ranks."""
    key, end = f"zeroaccel/apart/{number}", time.monotonic() + _limit(state)
    arrived = _store().add(key, 1)
    look = time.monotonic() + PATIENCE
    while arrived < state.num_processes:
        now = time.monotonic()
        if now > min(look, end):  # one that waits elsewhere has signed, and need not be waited for
            absent = _absent(state, number, 0.0)
            if not absent or now > end:
                return absent
            look = now + PATIENCE
        time.sleep(0.002)
        arrived = _store().add(key, 0)
    return []


def _difference(said: list[tuple[str, str]], remedy: str) -> str:
    names = {name for name, _ in said}
    if len(names) == 1:
        shown = "".join(f"\n  rank {rank}: {outline}" for rank, (_, outline) in enumerate(said))
        return f"{names.pop()} was given different things on different ranks: {remedy}{shown}"
    shown = "".join(f"\n  rank {rank}: {name}" for rank, (name, _) in enumerate(said))
    return f"the ranks are at different places of the script: all of them must make the same calls in one order{shown}"


def attend(state: PartialState, name: str, start: Callable[[], Any]) -> None:
    """Waits for a collective of all ranks.

    Args:
        state: of this rank.
        name: function that the script called.
        start: begins the collective and returns its handle (`async_op=True`).

    Raises:
        DistributedError: it failed, or a rank did not come in time.
    """
    number, begin = next(_numbers), time.monotonic()
    problem: Exception | None = None
    try:
        work = start()
        if _done(state, work, PATIENCE):
            return
        _sign(state, number)
        if _done(state, work, _limit(state)):
            return
    except RuntimeError as error:  # gloo and NCCL: a connection is gone, or the time is over
        problem = error
    waited = time.monotonic() - begin
    raise DistributedError(_roll_call(state, number, name, waited, problem)) from problem


def _connect(state: PartialState, name: str) -> None:
    """Before a group's first collective: NCCL connects in it, and waits for a missing rank without any timeout."""
    global _connected
    group = dist.distributed_c10d._get_default_group()
    if group is _connected:
        return
    number, begin = next(_numbers), time.monotonic()
    _sign(state, number)
    if _absent(state, number, _limit(state)):
        raise DistributedError(_roll_call(state, number, name, time.monotonic() - begin, None))
    _connected = group


def _done(state: PartialState, work: Any, seconds: float) -> bool:
    """Whether the collective is over `seconds` from now.

    Raises:
        RuntimeError: it failed.
    """
    if state.backend == "gloo":
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if work.is_completed():
                raise
            return False
        return True
    begin = time.monotonic()
    while not work.is_completed():  # NCCL's `wait` returns at once
        waited = time.monotonic() - begin
        if waited > seconds:
            return False
        time.sleep(0 if waited < 0.01 else 0.001)
    work.wait()
    return True


def _timeout(state: PartialState) -> float:
    """Seconds after which the process group gives a collective up."""
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(state.device)
    return float(backend.options._timeout.total_seconds())


def _limit(state: PartialState) -> float:
    """Seconds to wait for other ranks, so that who is missing can be said before the group's timeout."""
    return max(PATIENCE, EARLIER * _timeout(state) - 2 * PATIENCE)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _sign(state: PartialState, number: int) -> None:
    _store().set(f"zeroaccel/waits/{state.process_index}", str(number))


def _has_signed(rank: int, number: int) -> bool:
    key = f"zeroaccel/waits/{rank}"
    return bool(_store().check([key])) and int(_store().get(key)) >= number


def _roll_call(state: PartialState, number: int, name: str, waited: float, problem: Exception | None) -> str:
    """Who is missing, as the text of an error."""
    try:
        _sign(state, number)
        absent = _absent(state, number, PATIENCE + 1)  # one that came a moment ago still has its patience
        _wait_for_readers(state, number, absent)
    except RuntimeError:  # the store lives in the launcher, or in rank 0
        return f"{name}: {_fell_apart(state, waited)}"
    if not absent:
        return f"{name} failed after {waited:.0f} s, though all ranks were there: {problem}"
    return (
        f"{name} must be called by all {state.num_processes} ranks, and {_ranks(absent)} did not come: rank"
        f" {state.process_index} waited {waited:.0f} s. Either it failed, then its own error says why; or the call"
        " stands where not all ranks get to, behind `if accelerator.is_main_process`, or in a loop that is longer on"
        " some ranks. Where more time is needed: InitProcessGroupKwargs(timeout=...)"
    )


def _fell_apart(state: PartialState, waited: float) -> str:
    return f"rank {state.process_index} waited {waited:.0f} s, then the run fell apart: see the other ranks"


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _absent(state: PartialState, number: int, seconds: float) -> list[int]:
    """Ranks that have not signed `seconds` from now."""
    absent = [rank for rank in range(state.num_processes) if rank != state.process_index]
    end = time.monotonic() + seconds
    while absent := [rank for rank in absent if not _has_signed(rank, number)]:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return absent


def _wait_for_readers(state: PartialState, number: int, absent: list[int]) -> None:
    """Keeps rank 0, in which the store may live, for some seconds, until the others that came have looked, too."""
    key, end = f"zeroaccel/read/{number}", time.monotonic() + PATIENCE + 1
    present = state.num_processes - len(absent)
    with suppress(RuntimeError):  # the store is gone: with rank 0, which has waited, or with the launcher
        readers = _store().add(key, 1)
        while state.process_index == 0 and readers < present and time.monotonic() < end:
            time.sleep(0.01)
            readers = _store().add(key, 0)
