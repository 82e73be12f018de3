"""Runs a job through torch's elastic launcher and says what went wrong, once."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from zeroaccel.commands.job import Job

# Signals that other ranks' ends bring about: the launcher's own, and the abort of a communication library.
_CONSEQUENCES = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)


def device_count() -> int:
    """Accelerators that a rank could have: visible GPUs and the like; 0 on a machine of CPUs."""
    if hasattr(torch, "accelerator"):
        return int(torch.accelerator.device_count())
    return torch.cuda.device_count()


def run(job: Job) -> int:
    """Starts the ranks and waits for them.

    Returns:
        0; or the exit status of the rank that failed first (128 + signal, if one killed it); or 128 + the
        signal that ended the launcher itself, after it has ended all ranks.
    """
    _quieten()
    os.environ.update(job.environment)
    if job.port is not None and _is_taken(job.address, job.port):
        print(f"zeroaccel launch: port {job.port} is taken, the ranks meet on a free one", file=sys.stderr)
        job = dataclasses.replace(job, port=None)
    with tempfile.TemporaryDirectory(prefix="zeroaccel-launch-") as log_dir:
        try:
            torchrun.run(torchrun.parse_args(job.torchrun_arguments(log_dir)))  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            return explain(error, job.num_processes)
        except SignalException as stop:
            print(f"zeroaccel launch: {stop.sigval.name}, all ranks were ended", file=sys.stderr)
            return 128 + stop.sigval.value
    return 0


def _quieten() -> None:
    """Silences torch's own account of a failure: ours names the rank, and the traceback is shown already."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _is_taken(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store binds: TIME_WAIT is free
        try:
            probe.bind((address, port))
        except OSError:
            return True
    return False


@dataclasses.dataclass(frozen=True)
class _Failure:
    rank: int
    status: int  # as the shell counts: 128 + signal
    text: str
    time_ns: int  # 0: a sudden end, which no other rank's end brings about
    ended_by_launcher: bool = False


def explain(error: ChildFailedError, num_processes: int) -> int:
    """Says on stderr which rank failed first and how; returns its exit status."""
    failures = sorted(
        (_read(rank, failure) for rank, failure in error.failures.items()), key=lambda failure: failure.time_ns
    )
    told = [failure for failure in failures if not failure.ended_by_launcher] or failures
    first, *later = told
    print(f"zeroaccel launch: rank {first.rank} of {num_processes} failed first: {first.text}", file=sys.stderr)
    for failure in later:
        print(f"zeroaccel launch: rank {failure.rank} failed after it: {failure.text}", file=sys.stderr)
    return first.status


def _read(rank: int, failure: ProcessFailure) -> _Failure:
    report = failure.error_file_data
    if "time_ns" in report:  # its own account, even if the launcher ended it before it was through
        status = report["status"]
        return _Failure(rank, status, f"{report['message']['message']} (exit status {status})", report["time_ns"])
    if failure.exitcode > 0:
        status = failure.exitcode
        return _Failure(rank, status, f"it ended with exit status {status} and no exception", 0)
    number = -failure.exitcode
    text = f"killed by {failure.signal_name()} (pid {failure.pid})"
    time_ns = sys.maxsize if number in _CONSEQUENCES else 0
    return _Failure(rank, 128 + number, text, time_ns, ended_by_launcher=number == signal.SIGTERM)
