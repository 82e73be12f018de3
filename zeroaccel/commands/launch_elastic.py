"""Runs a job through torch's elastic launcher and says what went wrong, once."""

from __future__ import annotations

import dataclasses
import errno
import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousError

from zeroaccel.commands import launch_failures
from zeroaccel.commands.job import ElasticJob, Meeting
from zeroaccel.errors import ConfigError


def device_count() -> int:
    """Accelerators that a rank could have: visible GPUs and the like; 0 on a machine of CPUs."""
    if hasattr(torch, "accelerator"):
        return int(torch.accelerator.device_count())
    return torch.cuda.device_count()


def run(job: ElasticJob) -> int:
    """Starts the ranks of this machine and waits for them.

    Returns:
        0; or the exit status of the rank that failed first (128 + signal, if one killed it); or 128 + the
        signal that ended the launcher itself, after it has ended all ranks; or 1 if the machines did not meet.

    Raises:
        ConfigError: the ranks cannot meet at this address, or on this port; or there is no folder for their logs.
    """
    _quieten()
    gc.freeze()  # what was imported stays: no pass over it at the end, which would take 0.3 s
    job = dataclasses.replace(job, meeting=reachable(job.meeting))
    with _log_folder(job) as log_dir:
        os.environ.update(job.environment)
        arguments = torchrun.parse_args(job.torchrun_arguments(log_dir))  # type: ignore[no-untyped-call]
        try:
            return launch_failures.supervise(lambda: torchrun.run(arguments), job, log_dir)  # type: ignore[no-untyped-call]
        except (RendezvousError, DistError) as error:
            where, reason = f"{job.meeting.address}:{job.meeting.port}", str(error).splitlines()[0]
            print(f"zeroaccel launch: the machines did not meet at {where}: {reason}", file=sys.stderr)
            return 1


def reachable(meeting: Meeting) -> Meeting:
    """The same meeting, on a free port where the given one is taken and nobody else has to know."""
    if meeting.port is None or (meeting.nodes > 1 and meeting.node != 0):
        return meeting
    # Machine 0 of several may be known to the others under an address that it does not see itself.
    failure = _try_port(meeting.address if meeting.nodes == 1 else "", meeting.port)
    if failure is None:
        return meeting
    if failure.errno == errno.EADDRINUSE and meeting.nodes == 1:
        print(f"zeroaccel launch: port {meeting.port} is taken, the ranks meet on a free one", file=sys.stderr)
        return dataclasses.replace(meeting, port=None)
    if failure.errno == errno.EADDRINUSE:
        raise ConfigError(f"port {meeting.port} is taken here: write another --main_process_port on all machines")
    if failure.errno == errno.EACCES:
        raise ConfigError(f"port {meeting.port} is not for this user: write a --main_process_port above 1023")
    raise ConfigError(
        f"the ranks cannot meet at {meeting.address}:{meeting.port}, which is no address of this machine:"
        f" leave --main_process_ip away ({failure.strerror})"
    )


def _try_port(address: str, port: int) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store binds: TIME_WAIT is free
        try:
            probe.bind((address, port))
        except OSError as failure:
            return failure
    return None


@contextmanager
def _log_folder(job: ElasticJob) -> Iterator[str]:
    """The folder for the ranks' logs and error files.

    Raises:
        ConfigError: the one that was named cannot be made.
    """
    if job.log_dir is not None:
        try:
            os.makedirs(job.log_dir, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log_dir {job.log_dir} cannot be made: {error.strerror}") from None
        yield job.log_dir
    elif job.keep_logs:
        folder = tempfile.mkdtemp(prefix="zeroaccel-logs-")
        print(f"zeroaccel launch: the ranks' output is kept in {folder}", file=sys.stderr)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="zeroaccel-launch-") as folder:
            yield folder


def _quieten() -> None:
    """Silences torch's own account of a failure: ours names the rank, and the traceback is shown already."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
