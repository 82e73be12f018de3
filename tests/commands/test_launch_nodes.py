"""Several machines through torch's launcher: what each is told, and two of them for real, on loopback."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, Ended, ended, reports, run, started
from tests.commands.settled import SCRIPT, elastic, job_of, nothing_launched
from tests.distributed.pool import free_port
from zeroaccel.commands import launch_elastic
from zeroaccel.commands.job import Meeting
from zeroaccel.commands.launch_elastic import reachable
from zeroaccel.errors import ConfigError

__all__ = ["nothing_launched"]

TWO = "--num_machines 2 --main_process_ip h0"
# What is typed beside these: how torchrun is told where to meet.
MEETING = {
    "--machine_rank 0": ["--nnodes=2", "--node_rank=0", "--master_addr=h0", "--master_port=29500"],
    "--machine_rank 1 --same_network": ["--nnodes=2", "--node_rank=1", "--master_addr=h0", "--master_port=29500"],
    "--machine_rank 1 --main_process_port 5": ["--nnodes=2", "--node_rank=1", "--master_addr=h0", "--master_port=5"],
    "--rdzv_backend c10d": ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=h0:29500"],
    "--rdzv_backend c10d --machine_rank 1": ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=h0:29500"],
    "--rdzv_backend c10d --machine_rank 0": [
        *("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=h0:29500", "--local_addr=h0"),
    ],
}


@pytest.mark.parametrize("options", MEETING)
def test_machines_meet_at_the_address_of_machine_0(options: str) -> None:
    arguments = elastic(f"{TWO} {options}").torchrun_arguments()
    assert arguments[: arguments.index("--nproc_per_node=1")] == MEETING[options]


# What is typed beside c10d: what torch's rendezvous is told.
HOSTING = [
    ("--machine_rank 0", ["--rdzv_conf=is_host=1"]),
    ("--machine_rank 1 --rdzv_conf timeout=5", ["--rdzv_conf=timeout=5,is_host=0"]),
    ("--machine_rank 1 --rdzv_conf is_host=1", ["--rdzv_conf=is_host=1"]),
    ("", []),
]


@pytest.mark.parametrize(("options", "told"), HOSTING)
def test_machine_0_is_the_host_of_the_others_where_it_is_known(options: str, told: list[str]) -> None:
    command = elastic(f"{TWO} --rdzv_backend c10d {options}").command()
    assert [word for word in command if word.startswith("--rdzv_conf")] == told


# What is typed, GPUs of this machine: ranks on it.
RANKS = [("", 4, 4), ("--num_processes 6", 4, 3), ("--num_processes 2", 0, 1), ("--gpu_ids 0,2", 2, 2)]


@pytest.mark.parametrize(("options", "devices", "expected"), RANKS)
def test_ranks_are_counted_over_all_machines(options: str, devices: int, expected: int) -> None:
    job = elastic(f"{TWO} --machine_rank 1 {options}", devices)
    assert (job.num_processes, job.world_size) == (expected, 2 * expected)


# What is typed: what the error must hold.
REFUSED = {
    "--num_machines 2": ["2 problems", "2 machines need --main_process_ip", "which of the 2 machines is this?"],
    f"{TWO}": ["which of the 2 machines is this? Write --machine_rank, 0 to 1"],
    f"{TWO} --machine_rank 2": ["--machine_rank is 2", "0 to 1"],
    f"{TWO} --machine_rank 0 --num_processes 3": ["--num_processes is 3", "all 2 machines together", "a multiple of 2"],
    f"{TWO} --machine_rank 0 --main_process_port 0": ["--main_process_port is 0", "cannot guess a free port"],
    f"{TWO} --machine_rank 0 --num_processes 10 --gpu_ids 0,1": ["5 ranks, but 2 GPU(s)", "--num_processes 4"],
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_machines_cannot_know_of_each_other_has_to_be_said(options: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(options, devices=2)
    assert all(part in str(caught.value) for part in REFUSED[options])


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.full)])
def test_two_machines_train_together(backend: str, tmp_path: Path) -> None:
    results = on_two_machines(("--rdzv_backend", backend, "--zero_stage", "2"), "report.py", tmp_path)
    assert [result.status for result in results] == [0, 0], [result.err for result in results]
    for report in reports(tmp_path):
        assert (report["world_size"], report["distributed_type"], report["plugin"]["zero_stage"]) == (2, "DEEPSPEED", 2)


def on_two_machines(options: tuple[str, ...], script: str, folder: Path) -> tuple[Ended, Ended]:
    """Runs two launchers with one rank each, as two machines would."""
    where = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    commands = [
        (*ZEROACCEL_LAUNCH, "--cpu", *where, "--machine_rank", node, *options, str(SCRIPTS / script), str(folder))
        for node in ("0", "1")
    ]
    (folder / "other").mkdir()
    with started(commands[0], folder) as first, started(commands[1], folder / "other") as second:
        return ended(first, folder), ended(second, folder / "other")


def test_a_machine_that_meets_nobody_says_where_it_waited(tmp_path: Path) -> None:
    port = str(free_port())
    where = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    alone = (*where, "--machine_rank", "1", "--rdzv_conf", "timeout=1")
    result = run((*ZEROACCEL_LAUNCH, "--cpu", *alone, SCRIPT, str(tmp_path)), tmp_path)
    assert result.status == 1
    assert f"zeroaccel launch: the machines did not meet at 127.0.0.1:{port}: " in result.err
    assert "Traceback" not in result.err


def test_a_taken_port_of_machine_0_is_an_error_for_all_machines_use_it() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken here: write another --main_process_port on all"):
            reachable(Meeting("h0", port, nodes=2, node=0))
        elsewhere = Meeting("h0", port, nodes=2, node=1)
        assert reachable(elsewhere) == elsewhere


def test_an_address_of_another_machine_is_no_place_to_meet_alone() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:\d+, which is no address of this machine: leave --main_proc"):
        reachable(Meeting("192.0.2.1", free_port()))


def test_a_port_that_only_the_system_may_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_elastic, "_try_port", lambda *_: PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(ConfigError, match="port 80 is not for this user: write a --main_process_port above 1023"):
        reachable(Meeting(port=80))
