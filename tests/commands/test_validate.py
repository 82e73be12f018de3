"""`zeroaccel config validate`: every problem of a file with line and column, and no word too many."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.runs import run as run_program
from zeroaccel.commands.config import validate

TEMPLATES = Path(__file__).parents[2] / "examples" / "deepspeed_config_templates"

# A file with a problem in many a line, and what is told of it: place and parts.
BAD = """\
{
  "train_batch_size": 30,
  "train_micro_batch_size_per_gpu": 4,
  "gradient_acumulation_steps": 2,
  "zero_optimization": {
    "stage": 2, "overlap_comm": "yes please",
    "offload_param": {"device": "nvme", "pin_memry": true},
    "sub_group_size": "auto"
  },
  "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3, "warmup_min_lr": "auto"}},
  "fp16": {"enabled": true}, "bf16": {"enabled": true},
  "compile": {"deepcompile": true, "autoep_non_moe": true}
}
"""
BAD_TOLD = [
    ("2:3", "train_batch_size is 30, no multiple of 4 (micro-batch)"),
    ("4:3", "gradient_acumulation_steps is no key", "did you mean 'gradient_accumulation_steps'?"),
    ("6:17", "zero_optimization.overlap_comm is 'yes please': write true or false"),
    ("7:23", "offload_param (nvme) works at stage 3 only"),
    ("7:23", "zero_optimization.offload_param.device is 'nvme' without nvme_path"),
    ("7:41", "zero_optimization.offload_param.pin_memry is no key", "did you mean 'pin_memory'?"),
    ("8:5", "zero_optimization.sub_group_size is 'auto'", "write a value, or leave the key out"),
    ("10:48", "scheduler.params.warmup_steps is no parameter of WarmupLR", "did you mean 'warmup_num_steps'?"),
    ("11:39", "fp16.enabled and bf16.enabled are both true"),
    ("12:15", "compile.deepcompile is True"),
]


def told_of(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, list[str]]:
    """Exit status, and the lines on stdout without the folder."""
    status = validate.run([str(path) for path in paths])
    return status, [line.replace(f"{paths[0].parent}/", "") for line in capsys.readouterr().out.splitlines()]


def check_lines(lines: list[str], name: str, expected: list[tuple[str, ...]]) -> None:
    assert len(lines) == len(expected), lines
    for line, (place, *parts) in zip(lines, expected, strict=True):
        assert line.startswith(f"{name}:{place}: "), line
        for part in parts:
            assert part in line


def test_all_problems_are_told_at_once_in_order_of_their_places(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(BAD)
    status, lines = told_of(capsys, path)
    assert status == 1
    check_lines(lines, "ds.json", BAD_TOLD)


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}

# One thing that cannot be, and parts of its line.
WRONG: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no zero_optimization": ({"bf16": {"enabled": True}}, ("1:1: ", "no zero_optimization section")),
    "no section": ({"zero_optimization": 2}, ("zero_optimization is 2: write a section",)),
    "stage": ({"zero_optimization": {"stage": 4}}, ("ZeRO has the stages 0, 1, 2 and 3",)),
    "batch size": ({**ZERO, "train_batch_size": 0}, ("train_batch_size is 0", "at least 1")),
    "optimizer on NVMe without path": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ("'nvme' without nvme_path",),
    ),
    "optimizer on NVMe below stage 3": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
        ("offload_optimizer to nvme works at stage 3 only",),
    ),
    "parameters offloaded below stage 3": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ("offload_param (cpu) works at stage 3 only",),
    ),
    "optimizer offloaded at stage 0": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        ("offload_optimizer needs stage 1 to 3",),
    ),
    "two precisions": ({**ZERO, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("enable one of them",)),
    "negative clipping": ({**ZERO, "gradient_clipping": -1}, ("use a norm above 0",)),
    "auto nowhere served": ({**ZERO, "prescale_gradients": "auto"}, ("prescale_gradients is 'auto'",)),
    "DeepCompile as a number": (
        {**ZERO, "compile": {"deepcompile": 1}},
        ("compile.deepcompile is 1",),
    ),
    "DeepCompile": ({**ZERO, "compile": {"deepcompile": True}}, ("compile.deepcompile is True", "leave it out")),
    "unknown optimizer": ({**ZERO, "optimizer": {"type": "Adamm"}}, ("did you mean 'Adam'?",)),
    "what only DeepSpeed knows": (
        {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
        ("DeepSpeed refuses this config", "'sum' is not supported with ZeRO stage 3"),
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_one_thing_that_cannot_be_is_one_line(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, parts = WRONG[name]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config, indent=1))
    status, lines = told_of(capsys, path)
    assert (status, len(lines)) == (1, 1), lines
    for part in parts:
        assert part in lines[0]


# Texts that are no DeepSpeed config, and what is told.
NO_CONFIG = {
    '{"a": 1,\n "b" 2}': ("ds.json:2:6: not valid JSON",),
    "[1]": ("a DeepSpeed config is a JSON object, this is a list",),
    '{"a": 1,\n "a": {"c": 1, "c": 2}}': ("ds.json:2:2: a is there twice", "ds.json:2:16: a.c is there twice"),
    "": ("ds.json:1:1: not valid JSON",),
}


@pytest.mark.parametrize("text", list(NO_CONFIG))
def test_what_is_no_config_is_told_with_its_place(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    status, lines = told_of(capsys, path)
    assert status == 1
    assert len(lines) == len(NO_CONFIG[text])
    for line, part in zip(lines, NO_CONFIG[text], strict=True):
        assert part in line


def test_templates_and_all_that_the_rules_serve_have_nothing_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    templates = sorted(TEMPLATES.glob("*.json"))
    status, lines = told_of(capsys, *templates)
    assert status == 0
    assert lines == [f"{path.name}: nothing to mend (DeepSpeed config)" for path in templates]


def test_a_scheduler_without_optimizer_section_is_the_scripts_affair(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Case c of the guide: an optimizer of the script's own with DeepSpeed's scheduler."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**ZERO, "scheduler": {"type": "WarmupLR"}}))
    status, lines = told_of(capsys, path)
    assert status == 0
    assert lines[1].startswith("ds.json:1:37: note: scheduler without an optimizer section: the script must pass")


# --- launch configurations --------------------------------------------------------------------------------------

LAUNCH = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n"

# What stands below `deepspeed_config`, and the problems.
LAUNCHES: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "nothing": ("  zero_stage: 3\n", []),
    "parameters offloaded below stage 3": (
        "  zero_stage: 2\n  offload_param_device: cpu\n",
        [("5:3", "offload_param (cpu) works at stage 3 only")],
    ),
    "NVMe without path": (
        "  zero_stage: 3\n  offload_optimizer_device: nvme\n",
        [("5:3", "'nvme' without nvme_path")],
    ),
    "unknown keys and wrong types": (
        "  zero_stag: 3\n  zero3_init_flag: 7\n",
        [("4:3", "zero_stag is no key", "did you mean zero_stage?"), ("5:3", "zero3_init_flag is 7")],
    ),
    "ambiguous": (
        "  zero_stage: 3\n  deepspeed_config_file: ds.json\n",
        [("5:3", "the launch config file sets zero_stage beside deepspeed_config_file")],
    ),
    "no such DeepSpeed config": (
        "  deepspeed_config_file: none.json\n",
        [("4:3", "there is no DeepSpeed config 'none.json'")],
    ),
}


@pytest.mark.parametrize("name", list(LAUNCHES))
def test_launch_configurations_are_checked_as_the_ranks_would_read_them(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(ZERO))
    text, expected = LAUNCHES[name]
    path = tmp_path / "launch.yaml"
    path.write_text(LAUNCH + text)
    status, lines = told_of(capsys, path)
    assert status == (1 if expected else 0)
    lines = [line for line in lines if not line.startswith("ds.json: nothing")]
    check_lines(lines, "launch.yaml", expected) if expected else check_fine(lines)


def check_fine(lines: list[str]) -> None:
    assert lines == ["launch.yaml: nothing to mend (launch configuration)"]


@pytest.mark.parametrize("name", ["launch.yaml", "launch.json"])
def test_the_deepspeed_config_that_a_launch_configuration_names_is_checked_too(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stages": 2}}))
    launch = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    (tmp_path / name).write_text(json.dumps(launch))
    status, lines = told_of(capsys, tmp_path / name)
    assert status == 1
    assert lines[0] == f"{name}: nothing to mend (launch configuration)"
    assert lines[1].startswith("ds.json:1:24: zero_optimization.stages is no key")


# --- the command ------------------------------------------------------------------------------------------------


def test_an_unreadable_file_is_status_2_and_the_others_are_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    status = validate.run([str(tmp_path / name) for name in ("none.json", "bytes.json", "", "ds.json")])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == f"{tmp_path}/ds.json: nothing to mend (DeepSpeed config)\n"
    reasons = [line.rpartition(": ")[2] for line in printed.err.splitlines() if line.startswith("zeroaccel config")]
    assert reasons == ["No such file or directory", "no text in UTF-8", "Is a directory"]


def test_stdout_holds_nothing_but_the_problems(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(BAD)
    command = (sys.executable, "-m", "zeroaccel", "config", "validate", str(tmp_path / "ds.json"))
    ended = run_program(command, tmp_path)
    assert ended.status == 1
    check_lines(ended.out.replace(f"{tmp_path}/", "").splitlines(), "ds.json", BAD_TOLD)


def test_no_file_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        validate.run([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("zeroaccel config validate: error: ")
