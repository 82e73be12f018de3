"""Starts real launchers, as a user's shell would, and reads what their ranks wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SCRIPTS = Path(__file__).parent / "scripts"
PROGRAMS = Path(sys.executable).parent
ZEROACCEL_LAUNCH = (sys.executable, "-m", "zeroaccel", "launch")
TIMEOUT = 90.0
OF_A_LAUNCHER = (
    *("ZEROACCEL_", "ACCELERATE_", "OMP_", "TORCHELASTIC_", "SLURM_"),
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"),
)


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: exit status, negative for a signal.
        out, err: what it and its ranks wrote.
        cpu_seconds: user and system time, those of its ranks included.
    """

    status: int
    out: str
    err: str
    cpu_seconds: float


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what a launcher sets, with this environment's programs on the path.

    No launch configuration of this user's is found.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
    kept["PATH"] = f"{PROGRAMS}{os.pathsep}{kept['PATH']}"  # DeepSpeed looks for ninja there
    return {**kept, "ZEROACCEL_HOME": os.devnull, **variables}


@contextmanager
def started(command: tuple[str, ...], folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, of which nothing is left afterwards. Its output goes to `folder`."""
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        environment = clean_environment(**variables)
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: tuple[str, ...], folder: Path, **variables: str) -> Ended:
    """Runs a program to its end.

    Raises:
        AssertionError: it did not end within `TIMEOUT` seconds.
    """
    with started(command, folder, **variables) as process:
        return ended(process, folder)


def ended(process: subprocess.Popen[bytes], folder: Path) -> Ended:
    """Waits for a program from `started`."""
    limit = time.monotonic() + TIMEOUT
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        assert time.monotonic() < limit, f"no end within {TIMEOUT} s: {(folder / 'err').read_text()}"
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(code)
    out, err = (folder / "out").read_text(), (folder / "err").read_text()
    return Ended(process.returncode, out, err, usage.ru_utime + usage.ru_stime)


def reports(folder: Path, world_size: int = 2) -> list[dict[str, Any]]:
    """What each rank wrote to `rank<N>.json`, in order of rank."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def wait_until(condition: Any, what: str, seconds: float = TIMEOUT) -> None:
    """Polls until `condition()` is true.

    Raises:
        AssertionError: it never was.
    """
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended and whose parent has not asked is none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
