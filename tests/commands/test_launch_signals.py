"""Signals to a running `zeroaccel launch` of two ranks: how it ends, and that nobody is left behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, Ended, ended, is_alive, started, wait_until
from zeroaccel.commands import launch_failures
from zeroaccel.commands.launch_signals import Ending

ON_TWO = (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2")
FAIL = str(SCRIPTS / "fail.py")
INTERRUPTED = "zeroaccel launch: SIGINT, all ranks were ended\n"
TERMINATED = "zeroaccel launch: SIGTERM, all ranks were ended\n"
WAITING = "zeroaccel launch: SIGINT, waiting for the ranks to end (once more: kill them)\n"


def terminate(launcher: int) -> None:
    os.kill(launcher, signal.SIGTERM)


def interrupt(launcher: int) -> None:
    os.kill(launcher, signal.SIGINT)


def interrupt_in_a_terminal(launcher: int) -> None:
    os.killpg(launcher, signal.SIGINT)


def interrupt_twice(launcher: int) -> None:
    interrupt(launcher)
    time.sleep(0.3)
    interrupt(launcher)


def hang_up_before(launcher: int) -> None:
    os.kill(launcher, signal.SIGHUP)
    time.sleep(1.0)
    terminate(launcher)


# What the ranks do, how the launcher is ended, its exit status, what it says, within how many seconds.
ENDS: dict[str, tuple[str, Callable[[int], None], int, str, float]] = {
    "Ctrl-C": ("sleep", interrupt_in_a_terminal, 130, INTERRUPTED, 5.0),
    "SIGINT to it alone": ("sleep", interrupt, 130, INTERRUPTED, 5.0),
    "Ctrl-C twice, ranks that take no notice": ("ignore signals", interrupt_twice, 130, INTERRUPTED, 5.0),
    "SIGTERM": ("sleep", terminate, 143, TERMINATED, 5.0),
    "SIGHUP under nohup, which does nothing": ("sleep", hang_up_before, 143, TERMINATED, 5.0),
    "SIGHUP": (
        "sleep",
        lambda pid: os.kill(pid, signal.SIGHUP),
        129,
        "zeroaccel launch: SIGHUP, all ranks were ended\n",
        5.0,
    ),
}
SLOW_ENDS = {
    "Ctrl-C, ranks that take no notice": ("ignore signals", interrupt, 130, WAITING + INTERRUPTED, 15.0),
    "SIGTERM, ranks that take no notice": (
        "ignore signals",
        terminate,
        143,
        f"zeroaccel launch: SIGTERM, waiting for the ranks to end (once more: kill them)\n{TERMINATED}",
        30.0,
    ),
}


def end_a_run(how: str, folder: Path) -> tuple[Ended, float, list[int]]:
    """How a launcher ended, after how many seconds, and which of its processes are left."""
    doing, end, *_ = {**ENDS, **SLOW_ENDS}[how]
    prefix = ("nohup",) if "nohup" in how else ()
    with started((*prefix, *ON_TWO, FAIL, doing, str(folder)), folder) as launcher:
        pids = wait_for_ranks(folder)
        end(launcher.pid)
        start = time.monotonic()
        result = ended(launcher, folder)
        return result, time.monotonic() - start, [pid for pid in pids if is_alive(pid)]


@pytest.fixture(scope="module")
def end_it(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Ended, float, list[int]]]:
    """`end_a_run`; those of `ENDS` run at once."""
    pool = ThreadPoolExecutor(3)
    runs = {how: pool.submit(end_a_run, how, tmp_path_factory.mktemp("run")) for how in ENDS}
    pool.shutdown(wait=False)
    return lambda how: runs[how].result() if how in runs else end_a_run(how, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("how", [*ENDS, *(pytest.param(how, marks=pytest.mark.full) for how in SLOW_ENDS)])
def test_a_launcher_that_is_ended_leaves_nobody_behind(
    how: str, end_it: Callable[[str], tuple[Ended, float, list[int]]]
) -> None:
    *_, status, told, limit = {**ENDS, **SLOW_ENDS}[how]
    result, seconds, left = end_it(how)
    assert (result.status, result.err) == (status, told)
    assert seconds < limit
    assert not left


def wait_for_ranks(folder: Path) -> list[int]:
    """Process ids of ranks that run their script, and of their children."""
    files = [folder / "pids0", folder / "pids1"]
    wait_until(lambda: all(file.exists() for file in files), "both ranks run the script")
    return [int(pid) for file in files for pid in file.read_text().split()]


def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    with started((*ON_TWO, FAIL, "sleep", str(tmp_path)), tmp_path) as launcher:
        first, child, second, other_child = wait_for_ranks(tmp_path)
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(first) and not is_alive(second), "the ranks end", seconds=10)
        for pid in (child, other_child):  # nobody is left who could: those of a rank are the script's own affair
            os.kill(pid, signal.SIGKILL)


def test_a_launcher_that_waits_for_other_machines_can_be_interrupted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = f"--num_machines 2 --machine_rank 0 --main_process_ip 127.0.0.1 --main_process_port {port}".split()
    options = ("--cpu", "--num_processes", "2", "--rdzv_backend", "static", *meeting)
    folder = tmp_path / "temporary"
    folder.mkdir()
    with started((*ZEROACCEL_LAUNCH, *options, FAIL, "sleep", str(tmp_path)), tmp_path, TMPDIR=str(folder)) as launcher:
        wait_until(lambda: port in listening(launcher.pid), "it waits for the other machine")
        interrupt(launcher.pid)
        start = time.monotonic()
        result = ended(launcher, tmp_path)
    assert (result.status, result.err) == (130, INTERRUPTED)
    assert time.monotonic() - start < 5.0
    assert not list(folder.iterdir())


def listening(pid: int) -> list[int]:
    """Ports that a process listens on."""
    return [each.laddr.port for each in psutil.Process(pid).net_connections() if each.status == psutil.CONN_LISTEN]


@pytest.mark.full
@pytest.mark.parametrize("seconds", [0.3 + 0.15 * number for number in range(16)])
def test_ctrl_c_at_any_moment_of_the_start_leaves_nobody_behind(seconds: float, tmp_path: Path) -> None:
    with started((*ON_TWO, FAIL, "sleep", str(tmp_path)), tmp_path) as launcher:
        time.sleep(seconds)
        everybody = psutil.Process(launcher.pid).children(recursive=True)
        interrupt_in_a_terminal(launcher.pid)
        result = ended(launcher, tmp_path)
        _, alive = psutil.wait_procs(everybody, timeout=5.0)
    assert result.status == 130, result.err
    assert not alive
    assert "Traceback" not in result.err


def test_a_signal_is_no_failure_whatever_it_interrupts(tmp_path: Path) -> None:
    ending = Ending(str(tmp_path))

    def start_that_fails_in_its_clean_up() -> None:
        try:
            ending.handle(signal.SIGTERM, None)
        finally:
            raise UnboundLocalError("the metric's start")

    assert launch_failures.run_ranks(start_that_fails_in_its_clean_up, ending) == {}
    with pytest.raises(UnboundLocalError):
        launch_failures.run_ranks(start_that_fails_in_its_clean_up, Ending(str(tmp_path)))
