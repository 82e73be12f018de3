"""What `zeroaccel launch` makes of its command line: nothing is started here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.runs import SCRIPTS
from tests.commands.settled import SCRIPT, elastic, job_of, nothing_launched
from zeroaccel.commands.launch import launch_command, launch_command_parser
from zeroaccel.commands.launch_options import parse
from zeroaccel.commands.main import main
from zeroaccel.config import environment
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.errors import ConfigError

__all__ = ["nothing_launched"]  # a fixture for every test here


def dashed(options: str) -> str:
    """The same options with dashes in their names."""
    return " ".join(word.replace("_", "-") if word.startswith("--") else word for word in options.split())


# What is typed: the plugin's fields that it reaches, through the environment.
REACHES_THE_PLUGIN: dict[str, dict[str, Any]] = {
    "--use_deepspeed": {"zero_stage": 2, "gradient_accumulation_steps": "auto", "offload_optimizer_device": "none"},
    "--zero_stage 1": {"zero_stage": 1},
    "--zero_stage 0": {"zero_stage": 0},
    "--gradient_clipping 0.5": {"gradient_clipping": 0.5},
    "--gradient_clipping 0": {"gradient_clipping": 0.0},
    "--offload_optimizer_device cpu": {"offload_optimizer_device": "cpu"},
    "--offload_optimizer_device CPU": {"offload_optimizer_device": "cpu"},
    "--zero_stage 3 --offload_param_device cpu": {"offload_param_device": "cpu", "zero3_init_flag": True},
    "--zero_stage 3 --offload_param_device nvme --offload_param_nvme_path /disk/a_b": {
        "offload_param_device": "nvme",
        "offload_param_nvme_path": "/disk/a_b",
    },
    "--offload_optimizer_device nvme --offload_optimizer_nvme_path /disk/a_b": {
        "offload_optimizer_device": "nvme",
        "offload_optimizer_nvme_path": "/disk/a_b",
    },
    "--zero_stage 3 --zero3_init_flag false": {"zero3_init_flag": False},
    "--zero_stage 3 --zero3_init_flag True": {"zero3_init_flag": True},
    "--zero3_save_16bit_model true": {"zero3_save_16bit_model": True},
    "--zero3_save_16bit_model=false": {"zero3_save_16bit_model": False},
    "--auto_policy accelerate": {"auto_policy": "accelerate"},
}


@pytest.mark.parametrize("spelled", [str, dashed], ids=["underscores", "dashes"])
@pytest.mark.parametrize("options", REACHES_THE_PLUGIN)
def test_an_option_for_deepspeed_turns_it_on_and_reaches_the_plugin(
    options: str, spelled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in job_of(spelled(options)).environment.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert environment.flag("USE_DEEPSPEED")
    assert {name: getattr(plugin, name) for name in REACHES_THE_PLUGIN[options]} == REACHES_THE_PLUGIN[options]


# What is typed: all variables that the ranks get for it. None of these turns DeepSpeed on.
EXPORTED = {
    "": {},
    "--cpu": {"ZEROACCEL_USE_CPU": "true"},
    "--use_cpu": {"ZEROACCEL_USE_CPU": "true"},
    "--gradient_accumulation_steps 4": {"ZEROACCEL_GRADIENT_ACCUMULATION_STEPS": "4"},
    "--mixed_precision fp8": {"ZEROACCEL_MIXED_PRECISION": "fp8"},
    "--mixed_precision BF16": {"ZEROACCEL_MIXED_PRECISION": "bf16"},
    "--mixed_precision no": {"ZEROACCEL_MIXED_PRECISION": "no"},
    "--debug": {"ZEROACCEL_DEBUG_MODE": "true"},
    "--num_machines 1 --machine_rank 0 --same_network --rdzv_backend static": {},
    "--dynamo_backend NO -q": {"ZEROACCEL_DYNAMO_BACKEND": "NO"},
    "--dynamo_backend inductor": {"ZEROACCEL_DYNAMO_BACKEND": "INDUCTOR"},
    "--dynamo_mode max-autotune --dynamo_use_fullgraph": {
        "ZEROACCEL_DYNAMO_MODE": "max-autotune",
        "ZEROACCEL_DYNAMO_USE_FULLGRAPH": "true",
    },
    "--dynamo_use_dynamic --dynamo_use_regional_compilation": {
        "ZEROACCEL_DYNAMO_USE_DYNAMIC": "true",
        "ZEROACCEL_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    },
    "--quiet --rdzv_backend c10d": {},
    "--enable_cpu_affinity": {"ZEROACCEL_CPU_AFFINITY": "true"},
    "--max_restarts 2 --tee 3 --log_dir /logs --role worker --monitor_interval 5 --rdzv_conf timeout=9": {},
}


@pytest.mark.parametrize("spelled", [str, dashed], ids=["underscores", "dashes"])
@pytest.mark.parametrize("options", EXPORTED)
def test_only_what_was_typed_is_handed_to_the_ranks(options: str, spelled: Any) -> None:
    exported = job_of(spelled(options)).environment
    del exported["OMP_NUM_THREADS"], exported["PYTHONPATH"]
    assert exported == EXPORTED[options]


# What is typed, GPUs of the machine: ranks that start.
RANKS = [
    ("", 0, 1),
    ("", 4, 4),
    ("--num_processes 2", 0, 2),
    ("--num_processes 2", 4, 2),
    ("--multi_gpu", 4, 4),
    ("--gpu_ids all", 4, 4),
    ("--gpu_ids 1,3", 2, 2),
    ("--gpu_ids 1,3 --num_processes 1", 2, 1),
]


@pytest.mark.parametrize(("options", "devices", "expected"), RANKS)
def test_there_is_a_rank_for_each_gpu_unless_told_otherwise(options: str, devices: int, expected: int) -> None:
    assert elastic(options, devices).num_processes == expected


def test_named_gpus_are_the_only_visible_ones() -> None:
    assert job_of("--gpu_ids 1,3", devices=2).environment["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "CUDA_VISIBLE_DEVICES" not in job_of("--gpu_ids all", devices=2).environment


def test_threads_are_the_ranks_share_of_the_cores_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_of("--num_processes 100000").environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in job_of("--num_processes 2").environment
    assert job_of("--num_cpu_threads_per_process 3").environment["OMP_NUM_THREADS"] == "3"


def test_everything_after_the_script_is_the_scripts_own(capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--zero_stage", "7", "--", "--cpu", "-m", "--unknown")
    options = parse(["--zero_stage", "1", SCRIPT, *own])
    assert (options.training_script, tuple(options.training_script_args)) == (SCRIPT, own)
    assert (options.zero_stage, options.cpu) == (1, None)
    assert main(["launch", "--cpu", "--dry_run", SCRIPT, *own]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"launch_rank {SCRIPT} {' '.join(own)}")


# What is typed in place of `--main_process_port ...`: how torchrun is told where to meet.
MEETING = {
    "": ["--standalone", "--local_addr=127.0.0.1"],
    "--main_process_port 0": ["--standalone", "--local_addr=127.0.0.1"],
    "--main_process_port 29511": ["--master_addr=127.0.0.1", "--master_port=29511"],
    "--main_process_ip 10.0.0.5 --main_process_port 29511": ["--master_addr=10.0.0.5", "--master_port=29511"],
}


@pytest.mark.parametrize("options", MEETING)
def test_the_ranks_meet_on_the_port_that_was_given_else_on_a_free_one(options: str) -> None:
    arguments = elastic(options).torchrun_arguments()
    assert arguments[1 : arguments.index("--nproc_per_node=1")] == MEETING[options]


def test_dry_run_prints_variables_and_command_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--cpu", "--num_processes", "2", "--offload_optimizer_nvme_path", "/my disk"]
    assert main(["launch", *options, "-m", "json.tool", "--sort keys"]) == 0
    *variables, command = capsys.readouterr().out.splitlines()
    assert variables[1].startswith("PYTHONPATH=")
    assert variables[2:] == [
        "ZEROACCEL_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH='/my disk' \\",
        "ZEROACCEL_USE_CPU=true \\",
        "ZEROACCEL_USE_DEEPSPEED=true \\",
    ]
    assert variables[0].startswith("OMP_NUM_THREADS=")
    assert command == (
        "torchrun --nnodes=1 --standalone --local_addr=127.0.0.1 --nproc_per_node=2 --max_restarts=0"
        " -m zeroaccel.commands.launch_rank -m json.tool '--sort keys'"
    )


# The command line: what its one line of error must hold, the offending value and the remedy.
REFUSED_COMMAND_LINES = {
    "launch": ["required: SCRIPT"],
    "launch --cpu": ["required: SCRIPT"],
    f"launch --zero_stge 2 {SCRIPT}": ["unknown option --zero_stge", "did you mean --zero_stage?"],
    f"launch --offload-optimizer-devise=cpu {SCRIPT}": ["--offload-optimizer-devise", "--offload_optimizer_device?"],
    f"launch --xyzzy {SCRIPT}": ["unknown option --xyzzy", "zeroaccel launch --help"],
    f"launch --zero_stage 4 {SCRIPT}": ["--zero_stage", "'4'", "0 to 3"],
    f"launch --zero_stage two {SCRIPT}": ["'two'", "whole number"],
    f"launch --num_processes 0 {SCRIPT}": ["--num_processes", "'0'", "1 or more"],
    f"launch --gradient_clipping -1 {SCRIPT}": ["--gradient_clipping", "'-1'", "0.0 or more"],
    f"launch --gradient_clipping nan {SCRIPT}": ["'nan'", "0.0 or more"],
    f"launch --zero3_init_flag maybe {SCRIPT}": ["--zero3_init_flag", "'maybe'", "true or false"],
    f"launch --mixed_precision fp4 {SCRIPT}": ["--mixed_precision", "fp4", "'fp8'"],
    f"launch --offload_param_device disk {SCRIPT}": ["--offload_param_device", "disk", "'nvme'"],
    f"launch --main_process_port 70000 {SCRIPT}": ["'70000'", "0 to 65535"],
    f"launch --rdzv_backend etcd {SCRIPT}": ["--rdzv_backend", "etcd", "'c10d'"],
    "launch nowhere.py": ["no script 'nowhere.py'", "seen from"],
    "launch -m no_such_package.train": ["no module 'no_such_package.train'"],
    f"launch {SCRIPTS.parent}": ["without a __main__.py", "name the script"],
    f"launch --cpu --machine_rank 1 {SCRIPT}": ["--machine_rank is 1", "0 to 0"],
    f"launch --cpu -m --no_python {SCRIPT}": ["-m", "--no_python", "leave one away"],
    "launch --cpu --no_python no-such-program": ["no program 'no-such-program'", "PATH"],
    f"launch --cpu --no_python {SCRIPT}": ["may not be executed", "chmod +x"],
    f"launch --gpu_ids 0,,1 {SCRIPT}": ["--gpu_ids", "'0,,1'", "commas between"],
    f"launch --tee 4 {SCRIPT}": ["--tee", "'4'", "3 (both)"],
    f"launch --rdzv_conf timeout {SCRIPT}": ["--rdzv_conf", "'timeout'", "key=value"],
    f"launch --max_restarts -1 {SCRIPT}": ["--max_restarts", "'-1'", "0 or more"],
    f"launch --deepspeed_multinode_launcher rsh {SCRIPT}": ["rsh", "'pdsh'"],
    f"launch --use_fsdp --fsdp_version 2 {SCRIPT}": ["--use_fsdp", "ZeRO stage 3 (--zero_stage 3)"],
    f"launch --megatron-lm-tp-degree=2 {SCRIPT}": ["--megatron-lm-tp-degree", "Megatron-LM does not run here"],
    f"launch --dynamo_backend fast {SCRIPT}": ["'FAST'", "'INDUCTOR'"],
    f"launch --cpu --multi_gpu {SCRIPT}": ["--cpu", "--multi_gpu", "leave one side away"],
    f"launch --cpu --gpu_ids 0 {SCRIPT}": ["--cpu", "--gpu_ids", "leave one side away"],
    f"launch --deepspeed_config_file absent.json {SCRIPT}": ["--deepspeed_config_file", "absent.json"],
    f"launch --cpu --log_dir {SCRIPT} {SCRIPT}": ["--log_dir", "cannot be made: File exists"],
    "lunch": ["'lunch'", "launch"],
    "--lunch": ["--lunch"],
}


@pytest.mark.parametrize("command", REFUSED_COMMAND_LINES)
def test_a_wrong_command_line_is_one_line_and_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status: Any = None
    try:
        status = main(command.split())
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    assert status == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert all(part in told.err for part in REFUSED_COMMAND_LINES[command])


# What is in the DeepSpeed config: what the error must hold.
NO_CONFIG = {
    '{"zero_optimization": {"stage": 2}\n  "fp16": {}}': r"ds\.json:2:3: not valid JSON",
    "\udcff{}": r"ds\.json cannot be read: it is no text in UTF-8",
    "[]": r"ds\.json: a DeepSpeed config is a JSON object, this is a list",
    "{}": "has no zero_optimization section",
}


@pytest.mark.parametrize("text", NO_CONFIG)
def test_a_config_file_that_is_none_is_refused_before_any_rank_starts(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=f"--deepspeed_config_file: .*{NO_CONFIG[text]}"):
        job_of(f"--deepspeed_config_file {tmp_path / 'ds.json'}")


# What is typed, GPUs of the machine: what the error must hold.
TOO_FEW_GPUS = [
    ("--num_processes 3", 2, "3 ranks, but 2 GPU.*--num_processes 2, or add --cpu"),
    ("--gpu_ids 0,1,7", 2, "3 ranks, but 2 GPU"),
    ("--gpu_ids 0 --num_processes 2", 1, "2 ranks, but 1 GPU"),
    ("--multi_gpu", 0, "--multi_gpu, but no GPU is visible"),
    ("--gpu_ids 0,1", 0, "--gpu_ids 0,1, but no GPU is visible"),
]


@pytest.mark.parametrize(("options", "devices", "error"), TOO_FEW_GPUS)
def test_more_ranks_than_gpus_are_refused(options: str, devices: int, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        job_of(options, devices)


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "zeroaccel COMMAND [options]" in capsys.readouterr().out


HEAVY = ("torch", "deepspeed", "numpy", "accelerate", "transformers", "yaml", "rich")


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["launch", "--help"], ["launch", "--cpu", "--dry_run", SCRIPT]], ids=" ".join
)
def test_what_starts_no_rank_loads_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom zeroaccel.commands.main import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        f"print('loaded:', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert len(result.stdout.splitlines()) > 1


# What is typed: arguments of torch's launcher that it becomes.
TORCHRUN = {
    "": ["--max_restarts=0"],
    "--max_restarts 2 --monitor_interval 0.5": ["--max_restarts=2", "--monitor_interval=0.5"],
    "-t 0:1,1:3 --log_dir /logs --role x": ["--max_restarts=0", "--tee=0:1,1:3", "--role=x", "--log_dir=/logs"],
    "--rdzv_conf timeout=5,is_host=0": ["--max_restarts=0", "--rdzv_conf=timeout=5,is_host=0"],
}


@pytest.mark.parametrize("options", TORCHRUN)
def test_torchs_launcher_is_told(options: str) -> None:
    command = elastic(options).command()
    assert command[command.index("--nproc_per_node=1") + 1 : command.index("-m")] == TORCHRUN[options]


def test_ranks_are_bound_to_the_cores_beside_their_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--enable_cpu_affinity needs numactl"):
        job_of("--enable_cpu_affinity", devices=1)
    (tmp_path / "numactl").touch(mode=0o755)
    job = elastic("--enable_cpu_affinity", devices=1)
    assert "--numa_binding=node" in job.command()
    assert "ZEROACCEL_CPU_AFFINITY" not in job.environment


def test_scripts_import_from_the_folder_that_they_are_launched_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_of("--cpu").environment["PYTHONPATH"] == str(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"/first:{tmp_path}")
    assert job_of("--cpu").environment["PYTHONPATH"] == f"/first:{tmp_path}"
    monkeypatch.setenv("PYTHONPATH", "/first")
    assert job_of("--cpu").environment["PYTHONPATH"] == f"/first:{tmp_path}"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)3 problems.*1\. there is no script.*2\. --cpu leaves.*3\. .*absent\.json"
    ):
        job_of("--cpu --multi_gpu --deepspeed_config_file absent.json", script="nowhere.py")


def test_other_programs_launch_through_accelerates_names(capsys: pytest.CaptureFixture[str]) -> None:
    args = launch_command_parser().parse_args(["--cpu", "--dry-run", SCRIPT, "--lr", "1"])
    launch_command(args)
    assert capsys.readouterr().out.rstrip().endswith(f"launch_rank {SCRIPT} --lr 1")
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--cpv", SCRIPT])
    assert "did you mean --cpu?" in capsys.readouterr().err
