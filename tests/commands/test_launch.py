"""Real runs of `zeroaccel launch` on two CPU ranks: what the script sees, and how a run ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.runs import (
    PROGRAMS,
    SCRIPTS,
    ZEROACCEL_LAUNCH,
    Ended,
    ended,
    is_alive,
    reports,
    run,
    started,
    wait_until,
)

ON_TWO = (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2")
FAIL = str(SCRIPTS / "fail.py")


def test_every_option_reaches_the_accelerator_and_its_plugin(tmp_path: Path) -> None:
    options = (
        f"--zero_stage 3 --gradient_accumulation_steps 4 --gradient_clipping 0.5 --mixed_precision bf16"
        f" --offload_optimizer_device nvme --offload_optimizer_nvme_path {tmp_path}/optimizer"
        f" --offload-param-device nvme --offload-param-nvme-path {tmp_path}/param"
        " --zero3_init_flag false --zero3_save_16bit_model true --auto_policy accelerate --debug"
        " --num_machines 1 --machine_rank 0 --dynamo_backend no"
    ).split()
    result = run((*ON_TWO, *options, str(SCRIPTS / "report.py"), str(tmp_path), "--cpu", "a b"), tmp_path)
    assert result.status == 0, result.err
    first, second = reports(tmp_path)
    assert first == second
    assert first == {
        "arguments": [str(tmp_path), "--cpu", "a b"],
        "world_size": 2,
        "device": "cpu",
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "accumulation": 4,
        "debug": True,
        "plugin": {
            "zero_stage": 3,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 0.5,
            "offload_optimizer_device": "nvme",
            "offload_param_device": "nvme",
            "offload_optimizer_nvme_path": f"{tmp_path}/optimizer",
            "offload_param_nvme_path": f"{tmp_path}/param",
            "zero3_init_flag": False,
            "zero3_save_16bit_model": True,
            "auto_policy": "accelerate",
        },
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": f"{tmp_path}/optimizer"},
            "offload_param": {"device": "nvme", "nvme_path": f"{tmp_path}/param"},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def test_a_config_file_and_fp8_reach_the_accelerator_of_a_single_rank(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 3, "bf16": {"enabled": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    options = ("--cpu", "--mixed_precision", "fp8", "--deepspeed_config_file", str(tmp_path / "ds.json"))
    result = run((*ZEROACCEL_LAUNCH, *options, str(SCRIPTS / "report.py"), str(tmp_path)), tmp_path)
    assert result.status == 0, result.err
    (report,) = reports(tmp_path, world_size=1)
    assert (report["world_size"], report["mixed_precision"], report["accumulation"]) == (1, "fp8", 3)
    assert (report["plugin"]["zero_stage"], report["bf16"]) == (1, {"enabled": True})


def fail(how: str, folder: Path) -> Ended:
    return run((*ON_TWO, FAIL, how, str(folder)), folder)


def test_the_script_that_raises_is_told_once_with_its_rank(tmp_path: Path) -> None:
    result = fail("raise", tmp_path)
    assert result.status == 1
    # Rank 0 fails, too, in its collective: the news is rank 1's exception.
    assert result.err.count("Traceback (most recent call last)") == 1
    assert result.err.count('raise ValueError("the loss is not a number")') == 1
    assert "rank 1 of 2 failed first: ValueError: the loss is not a number (exit status 1)" in result.err
    assert "launch_rank" not in result.err
    assert "runpy" not in result.err


def test_the_exit_status_is_the_scripts(tmp_path: Path) -> None:
    result = fail("exit", tmp_path)
    assert result.status == 3
    assert result.err == "zeroaccel launch: rank 1 of 2 failed first: sys.exit(3) (exit status 3)\n"


def test_a_rank_killed_by_the_system_is_named_before_those_that_miss_it(tmp_path: Path) -> None:
    result = fail("kill", tmp_path)
    pid = (tmp_path / "pid1").read_text()
    assert result.status == 128 + signal.SIGKILL
    assert f"zeroaccel launch: rank 1 of 2 failed first: killed by SIGKILL (pid {pid})" in result.err


def ctrl_c(launcher: int) -> None:
    os.killpg(launcher, signal.SIGINT)  # as a terminal does: launcher and ranks get it


# How the launcher is ended, its exit status, what it says.
ENDS: dict[str, tuple[Callable[[int], None], int, str]] = {
    "ctrl-c": (ctrl_c, 128 + signal.SIGINT, "zeroaccel launch: SIGINT, all ranks were ended\n"),
    "kill": (
        lambda launcher: os.kill(launcher, signal.SIGTERM),
        128 + signal.SIGTERM,
        "zeroaccel launch: SIGTERM, all ranks were ended\n",
    ),
    "kill -9": (lambda launcher: os.kill(launcher, signal.SIGKILL), -signal.SIGKILL, ""),
}


@pytest.mark.parametrize("how", ENDS)
def test_ending_the_launcher_leaves_no_rank_behind(how: str, tmp_path: Path) -> None:
    end, status, told = ENDS[how]
    with started((*ON_TWO, FAIL, "sleep", str(tmp_path)), tmp_path) as launcher:
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        wait_until(lambda: all(file.exists() for file in files), "both ranks run the script")
        ranks = [int(file.read_text()) for file in files]
        end(launcher.pid)
        result = ended(launcher, tmp_path)
        assert (result.status, result.err) == (status, told)
        wait_until(lambda: not any(is_alive(pid) for pid in ranks), "the ranks end", seconds=10)


def test_a_taken_port_is_said_and_replaced_and_a_module_is_started_by_its_name(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run((*ZEROACCEL_LAUNCH, "--cpu", "--main_process_port", port, "-m", "this"), tmp_path)
    assert result.status == 0
    assert result.out.startswith("The Zen of Python")
    assert result.err == f"zeroaccel launch: port {port} is taken, the ranks meet on a free one\n"


def test_launch_is_torchrun_plus_less_than_a_fifth_of_a_second(tmp_path: Path) -> None:
    torchrun = (str(PROGRAMS / "torchrun"), "--standalone", "--nproc_per_node=1", "-m", "this")
    ours = (*ZEROACCEL_LAUNCH, "--cpu", "-m", "this")
    # Processor time, not time on the clock: other work on this machine must not decide.
    fastest = [min(run(command, tmp_path).cpu_seconds for _ in range(2)) for command in (torchrun, ours)]
    assert fastest[1] < fastest[0] + 0.2


def test_the_command_is_installed(tmp_path: Path) -> None:
    command = run((str(PROGRAMS / "zeroaccel"), "--version"), tmp_path)
    module = run((sys.executable, "-m", "zeroaccel", "--version"), tmp_path)
    assert command.out == module.out
    assert command.out.startswith("zeroaccel ")
