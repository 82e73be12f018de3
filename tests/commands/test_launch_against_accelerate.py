"""Every option of `accelerate launch` 1.15.0 is there with its meaning, or refused with a reason."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch as accelerates
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.commands.settled import SCRIPT, elastic, nothing_launched
from zeroaccel.commands.launch_options import REFUSED, launch_command_parser, refusal
from zeroaccel.commands.main import main

__all__ = ["nothing_launched"]

ACTIONS = [action for action in accelerates.launch_command_parser()._actions if action.dest != "help"]
SPELLINGS = sorted({spelling for action in ACTIONS for spelling in action.option_strings})


def ours() -> dict[str, argparse.Action]:
    """Our options by every spelling."""
    return launch_command_parser()._option_string_actions


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_option_is_accepted_in_both_spellings_or_refused_with_its_reason(spelling: str) -> None:
    dashed = "--" + spelling[2:].replace("_", "-") if spelling.startswith("--") else spelling
    accepted = {spelling, dashed} <= set(ours())
    refused = refusal(spelling) is not None and refusal(dashed) is not None
    assert accepted != refused


@pytest.mark.parametrize("spelling", [spelling for spelling in SPELLINGS if refusal(spelling)])
def test_a_refused_option_is_one_line_with_its_reason(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["launch", spelling, "1", SCRIPT])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err == f"zeroaccel launch: error: {spelling}: {refusal(spelling)}\n"


def test_no_reason_stands_there_for_an_option_that_accelerate_has_not() -> None:
    names = [spelling.lstrip("-") for spelling in SPELLINGS]
    unused = {key for key in REFUSED if not any(name == key or name.startswith(key) for name in names)}
    assert not unused


def test_flags_and_values_are_the_same() -> None:
    for action in ACTIONS:
        for spelling in action.option_strings:
            if spelling in ours():
                assert ours()[spelling].nargs == action.nargs, spelling


def test_what_follows_the_options_has_the_same_names() -> None:
    line = ["--num_processes", "2", "train.py", "--lr", "1", "--cpu"]
    theirs, mine = accelerates.launch_command_parser().parse_args(line), launch_command_parser().parse_args(line)
    for name in ("training_script", "training_script_args", "num_processes"):
        assert getattr(mine, name) == getattr(theirs, name)


YAML = """
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: max-autotune
  dynamo_use_fullgraph: true
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
use_cpu: false
"""
FULL = (
    "--use_deepspeed --zero_stage 2 --gradient_accumulation_steps 3 --gradient_clipping 0.25 --mixed_precision fp16"
    " --offload_optimizer_device cpu --offload_param_device none --zero3_init_flag false --zero3_save_16bit_model false"
    " --deepspeed_moe_layer_cls_names A,B --dynamo_backend eager --dynamo_mode reduce-overhead"
    " --dynamo_use_dynamic --debug --num_processes 2 --num_machines 1"
)
# What is typed; "FILE" is the launch configuration above.
LINES = {
    "plugin": "--use_deepspeed --num_processes 2 --num_machines 1 --zero_stage 1",
    "everything": FULL,
    "file": "--config_file FILE",
    "file, and typed otherwise": "--config_file FILE --zero_stage 2 --num_processes 1 --gradient_clipping 1",
    "file, and everything typed": f"--config_file FILE {FULL}",
}
# What Accelerate writes though nobody asked: defaults, which say what is so anyway.
WRITTEN_UNASKED = {
    "DYNAMO_MODE": "default",
    "DYNAMO_USE_FULLGRAPH": "False",
    "DYNAMO_USE_DYNAMIC": "False",
    "DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "DYNAMO_BACKEND": "NO",
    "CONFIG_DS_FIELDS": "",
    "MIXED_PRECISION": "no",
}


@pytest.mark.parametrize("case", LINES)
def test_the_ranks_get_the_same_variables(case: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(YAML)
    line = LINES[case].replace("FILE", str(file)).split()
    theirs, ranks = accelerate_variables(line)
    job = elastic(" ".join(line), devices=2)
    mine = {name.removeprefix("ZEROACCEL_"): value for name, value in job.environment.items()}
    assert job.num_processes == ranks
    for name, value in theirs.items():
        if WRITTEN_UNASKED.get(name) == value and name not in mine:
            continue
        if name == "CONFIG_DS_FIELDS":  # they also name what the command line overrules
            assert set(mine.get(name, "").split(",")) <= {"", *value.split(",")}
        else:
            assert mine[name].lower() == value.lower(), name


def accelerate_variables(line: list[str]) -> tuple[dict[str, str], int]:
    """The variables that Accelerate's launchers give to the ranks, and their number."""
    parser: Any = accelerates.launch_command_parser()
    args, defaults, from_file = accelerates._validate_launch_command(parser.parse_args([*line, SCRIPT]))
    fields = [*(defaults.deepspeed_config if defaults else {}), *(["mixed_precision"] if from_file else [])]
    args.deepspeed_fields_from_accelerate_config = ",".join(fields)
    # Its DeepSpeed launcher forgets torch.compile; the one of plain data parallelism knows it.
    environment = {**prepare_multi_gpu_env(copy.copy(args)), **prepare_deepspeed_cmd_env(args)[1]}
    prefix = "ACCELERATE_"
    kept = {name.removeprefix(prefix): value for name, value in environment.items() if name.startswith(prefix)}
    kept["PYTHONPATH"] = environment["PYTHONPATH"]
    return kept, int(args.nproc_per_node)
