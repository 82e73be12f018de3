"""What the launcher says when ranks fail or a signal ends them, and the exit status that it hands on."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from zeroaccel.commands import launch_memory, launch_signals
from zeroaccel.commands.job import ElasticJob
from zeroaccel.commands.launch_memory import Memory

# Signals that other ranks' ends bring about: the launcher's own, and the abort of a communication library.
_CONSEQUENCES = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)

# How Python, NumPy, PyTorch and the system say that there is no room on the host, and how PyTorch's devices do.
_NO_HOST_MEMORY = re.compile(r"(?<!OutOf)MemoryError|DefaultCPUAllocator|Cannot allocate memory")
_NO_DEVICE_MEMORY = re.compile(r"OutOfMemoryError|out of memory|_ALLOC_FAILED")
# What to try, the cheapest first.
_SPARE_THE_HOST = "fewer DataLoader workers, fewer ranks on this machine, offload to nvme instead of cpu"
_SPARE_THE_DEVICE = (
    "a smaller micro-batch with more --gradient_accumulation_steps, a higher --zero_stage, --offload_optimizer_device"
    " cpu, and at stage 3 --offload_param_device cpu"
)

_LINES = 3  # about ranks that failed later


@dataclass(frozen=True)
class Failure:
    """How a rank ended.

    Attributes:
        rank: its number among all ranks.
        status: as the shell counts: 128 + signal.
        text: what happened.
        time_ns: when it noted an exception; 0: a sudden end, which no other rank's end brings about.
        ended_by_launcher: it only ended because another rank had failed.
        stacks: where its threads were when the interpreter crashed.
    """

    rank: int
    status: int
    text: str
    time_ns: int
    ended_by_launcher: bool = False
    stacks: str = ""


def supervise(start: Callable[[], object], job: ElasticJob, log_dir: str) -> int:
    """Lets the ranks of a job run, and says on stderr how they failed, if they do.

    Args:
        start: starts them through torch's elastic launcher and waits for them.
        job: the job.
        log_dir: the elastic launcher's folder for logs.

    Returns:
        0; or the exit status of this machine's rank that failed first (128 + signal, if one killed it); or 128 + the
        signal that ended the launcher itself, after it has ended all ranks.
    """
    before, since, ending = Memory.read(), time.time(), launch_signals.Ending(log_dir)
    with ending.handled():
        try:
            failures = run_ranks(start, ending)
            ending.run_has_ended()
        except SignalException:  # it came when all ranks had ended
            failures = {}
        if failures or ending.signal is not None:
            launch_signals.end_groups(ending.ranks | {failure.pid for failure in failures.values()})
    if ending.signal is not None:
        _say(f"{ending.signal.name}, all ranks were ended")
        return 128 + ending.signal
    if not failures:
        return 0
    first = tell([read(rank, failure, log_dir, since) for rank, failure in failures.items()], job.world_size)
    for line in advice(first, before, Memory.read(), job.num_processes):
        _say(line)
    return first.status


def run_ranks(start: Callable[[], object], ending: launch_signals.Ending) -> dict[int, ProcessFailure]:
    """What torch's launcher saw of the ranks that failed; a signal to it is no failure of theirs."""
    try:
        start()
    except ChildFailedError as error:
        return error.failures
    except Exception:
        if ending.signal is None:
            raise
        # It was interrupted just anywhere, and so can have failed in a clean-up of its own.
    return {}


def read(rank: int, failure: ProcessFailure, log_dir: str, since: float) -> Failure:
    """How a rank ended, by its own account and torch's.

    Args:
        rank: its number among all ranks.
        failure: what torch's launcher saw.
        log_dir: the elastic launcher's folder for logs.
        since: when the ranks were started, in seconds since 1970.
    """
    report = failure.error_file_data
    if "time_ns" in report:  # its own account, even if the launcher ended it before it was through
        status = report["status"]
        return Failure(rank, status, f"{report['message']['message']} (exit status {status})", report["time_ns"])
    if failure.exitcode > 0:
        status = failure.exitcode
        return Failure(rank, status, f"it ended with exit status {status}, and noted no exception", 0)
    number = -failure.exitcode
    return Failure(
        rank,
        status=128 + number,
        text=f"killed by {failure.signal_name()} (pid {failure.pid})",
        time_ns=sys.maxsize if number in _CONSEQUENCES else 0,
        ended_by_launcher=number == signal.SIGTERM,
        stacks=_stacks(log_dir, failure.local_rank, since),
    )


def _stacks(log_dir: str, local_rank: int, since: float) -> str:
    """What the interpreter of a rank wrote while it crashed; a folder of the user's can hold older runs' as well."""
    files = [file for file in Path(log_dir).glob(f"*/attempt_*/{local_rank}/stacks") if file.stat().st_mtime >= since]
    return max(files, key=lambda file: file.stat().st_mtime).read_text() if files else ""


def tell(failures: list[Failure], world_size: int) -> Failure:
    """Says which rank failed first and how, and what happened to the others; returns the first failure."""
    failures = sorted(failures, key=lambda failure: failure.time_ns)
    told = [failure for failure in failures if not failure.ended_by_launcher] or failures
    first, *later = told
    if first.stacks:
        print(first.stacks.strip(), file=sys.stderr)
    _say(f"rank {first.rank} of {world_size} failed first on {socket.gethostname()}: {first.text}")
    ends: dict[str, list[int]] = {}
    for failure in later:
        ends.setdefault("the same" if failure.text == first.text else failure.text, []).append(failure.rank)
    for text, ranks in list(ends.items())[:_LINES]:
        _say(f"{_named(ranks)} failed after it: {text}")
    if rest := sorted(rank for ranks in list(ends.values())[_LINES:] for rank in ranks):
        _say(f"{_named(rest)} failed, too")
    return first


def advice(first: Failure, before: Memory, after: Memory, ranks: int) -> list[str]:
    """What is known about memory where it matters, and what to try.

    Args:
        first: the first failure.
        before, after: memory before the ranks were started, and now.
        ranks: how many were started on this machine.
    """
    kills = after.kills - before.kills
    if kills > 0:  # of the rank, or of a process of its own that it missed
        ended = "a process" if kills == 1 else f"{kills} processes"
        evidence = f"the kernel ended {ended} for lack of memory, {launch_memory.usage(before, after)}"
        return [f"probably out of memory: {evidence}; try {_SPARE_THE_HOST}"]
    if first.status == 128 + signal.SIGKILL:
        usage = launch_memory.usage(before, after)
        if launch_memory.is_full(before, after, ranks):
            return [f"perhaps out of memory: {usage}, for {ranks} ranks; try {_SPARE_THE_HOST}"]
        return [f"no sign of a lack of memory: {usage}"]
    if _NO_HOST_MEMORY.search(first.text):
        return [f"out of host memory ({launch_memory.usage(before, after)}): try {_SPARE_THE_HOST}"]
    if _NO_DEVICE_MEMORY.search(first.text):
        return [f"out of device memory: try {_SPARE_THE_DEVICE}"]
    return []


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _say(line: str) -> None:
    print(f"zeroaccel launch: {line}", file=sys.stderr, flush=True)
