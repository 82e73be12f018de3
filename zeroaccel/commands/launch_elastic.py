"""Runs a job through torch's elastic launcher and says what went wrong, once."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if TYPE_CHECKING:
    from zeroaccel.commands.launch import Job

# A rank that dies of these did not end because another one did, whatever the other one's traceback says.
_SUDDEN = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


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
            return _explain(error, Path(log_dir), job.num_processes)
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
    pid: int
    status: int  # as the shell counts: 128 + signal
    text: str
    sudden: bool
    time_ns: int


def _explain(error: ChildFailedError, log_dir: Path, num_processes: int) -> int:
    """Says on stderr which rank failed first and how; returns its exit status."""
    failures = sorted(
        (_read(rank, failure, log_dir) for rank, failure in error.failures.items()),
        key=lambda failure: (not failure.sudden, failure.time_ns),
    )
    # Ranks that the launcher ended on account of the others carry no news.
    told = [failure for failure in failures if failure.status != 128 + signal.SIGTERM] or failures
    first, *later = told
    print(f"zeroaccel launch: rank {first.rank} of {num_processes} failed first: {first.text}", file=sys.stderr)
    for failure in later:
        print(f"zeroaccel launch: rank {failure.rank} failed after it: {failure.text}", file=sys.stderr)
    return first.status


def _read(rank: int, failure: Any, log_dir: Path) -> _Failure:
    status = 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    for path in log_dir.glob(f"*/attempt_*/{failure.local_rank}/error.json"):
        report = json.loads(path.read_text())
        text = f"{report['message']['message']} (exit status {status})"
        return _Failure(rank, failure.pid, status, text, False, report["time_ns"])
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        sudden = -failure.exitcode in _SUDDEN
        return _Failure(rank, failure.pid, status, f"killed by {name} (pid {failure.pid})", sudden, sys.maxsize)
    return _Failure(rank, failure.pid, status, f"it ended with exit status {status}", False, sys.maxsize)
