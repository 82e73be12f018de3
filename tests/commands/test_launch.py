"""Real runs of `zeroaccel launch` on one machine: what the script sees. How runs fail: test_failures.py."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from tests.commands.runs import (
    PROGRAMS,
    SCRIPTS,
    ZEROACCEL_LAUNCH,
    reports,
    run,
)

ON_TWO = (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2")


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
        "config": {
            "fp16": {"enabled": False},
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": f"{tmp_path}/optimizer"},
                "offload_param": {"device": "nvme", "nvme_path": f"{tmp_path}/param"},
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "gradient_clipping": 0.5,
            "gradient_accumulation_steps": 4,
        },
    }


def test_ranks_keep_to_their_cores_and_their_output_is_kept(tmp_path: Path) -> None:
    options = ("--enable_cpu_affinity", "--tee", "1", "--log_dir", str(tmp_path / "logs"), "--role", "worker")
    result = run((*ON_TWO, *options, str(SCRIPTS / "environ.py"), str(tmp_path)), tmp_path)
    assert result.status == 0, result.err
    here = sorted(os.sched_getaffinity(0))
    shares = [report["cores"] for report in reports(tmp_path)]
    assert sorted(shares[0] + shares[1]) == here or len(here) == 1
    assert "[worker0]:rank 0" in result.out
    (log,) = (tmp_path / "logs").glob("*/attempt_0/1/stdout.log")
    assert log.read_text() == "rank 1\n"


def test_a_program_is_run_without_python_and_started_again(tmp_path: Path) -> None:
    shell = ("--no_python", "sh", "-c", 'test "$TORCHELASTIC_RESTART_COUNT" = 1 && echo "rank $RANK is up"')
    result = run((*ON_TWO, "--max_restarts", "1", "--monitor_interval", "0.02", *shell), tmp_path)
    assert result.status == 0, result.err
    assert sorted(result.out.splitlines()) == ["rank 0 is up", "rank 1 is up"]


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
