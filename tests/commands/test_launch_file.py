"""The launch configuration: what it decides, what beats it, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, run
from tests.commands.settled import SCRIPT, elastic, job_of, nothing_launched, settled
from zeroaccel.commands.main import main
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.errors import ConfigError

__all__ = ["nothing_launched"]

MACHINE = {"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, "num_machines": 1, "num_processes": 2}
REST = {"downcast_bf16": "no", "main_training_function": "main", "use_cpu": False}
GUIDE = {**MACHINE, **REST, "distributed_type": "DEEPSPEED", "mixed_precision": "fp16"}
STAGE_2 = {"gradient_accumulation_steps": 4, "zero_stage": 2, "offload_optimizer_device": "cpu"}


def write(path: Path, *parts: dict[str, Any], **keys: Any) -> str:
    """A launch configuration."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({name: value for part in (*parts, keys) for name, value in part.items()}))
    return str(path)


def plugin_of(options: str, monkeypatch: pytest.MonkeyPatch) -> DeepSpeedPlugin:
    """The plugin that a rank makes."""
    for name, value in job_of(options, devices=8).environment.items():
        monkeypatch.setenv(name, value)
    return DeepSpeedPlugin()


def test_the_default_file_is_found_and_typed_options_beat_it(tmp_path: Path) -> None:
    write(tmp_path / "home" / "default_config.yaml", GUIDE, deepspeed_config=STAGE_2)
    job = elastic("", devices=4)
    assert job.num_processes == 2
    assert job.environment["ZEROACCEL_DEEPSPEED_ZERO_STAGE"] == "2"
    assert job.environment["ZEROACCEL_MIXED_PRECISION"] == "fp16"
    job = elastic("--num_processes 3 --zero_stage 1 --mixed_precision no", devices=4)
    assert job.num_processes == 3
    assert job.environment["ZEROACCEL_DEEPSPEED_ZERO_STAGE"] == "1"
    assert job.environment["ZEROACCEL_MIXED_PRECISION"] == "no"
    assert job.environment["ZEROACCEL_GRADIENT_ACCUMULATION_STEPS"] == "4"


def test_the_default_file_is_not_for_the_cpu_but_a_named_one_is(tmp_path: Path) -> None:
    path = write(tmp_path / "home" / "default_config.yaml", GUIDE, deepspeed_config=STAGE_2)
    assert elastic("--cpu").num_processes == 1
    assert "ZEROACCEL_USE_DEEPSPEED" not in elastic("--cpu").environment
    job = elastic(f"--cpu --config_file {path}")
    assert (job.num_processes, job.environment["ZEROACCEL_USE_DEEPSPEED"]) == (2, "true")


# Keys of the file, what is typed beside it: what becomes of some options.
HOLDS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"distributed_type": "MULTI_GPU"}, "", {"multi_gpu": True, "use_deepspeed": None}),
    ({"distributed_type": "MULTI_GPU", "gpu_ids": "0,1"}, "--cpu", {"multi_gpu": None, "gpu_ids": None}),
    ({"distributed_type": "MULTI_CPU"}, "--gpu_ids 1", {"cpu": None, "gpu_ids": "1"}),
    ({"use_cpu": True}, "", {"cpu": True}),
    ({"use_cpu": True}, "--multi_gpu", {"cpu": None, "multi_gpu": True}),
    ({"deepspeed_config": STAGE_2}, "--multi_gpu", {"use_deepspeed": None, "zero_stage": None}),
    ({"deepspeed_config": STAGE_2}, "--multi_gpu --zero_stage 1", {"use_deepspeed": True, "zero_stage": 1}),
    ({"debug": True, "dynamo_config": {"dynamo_backend": "EAGER"}}, "", {"debug": True, "dynamo_backend": "EAGER"}),
    ({"gpu_ids": "all", "num_processes": 4}, "--num_processes 1", {"gpu_ids": "all", "num_processes": 1}),
]


@pytest.mark.parametrize(("keys", "typed", "expected"), HOLDS)
def test_what_holds(keys: dict[str, Any], typed: str, expected: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "launch.yaml", GUIDE, keys)
    options = settled(f"--config_file {path} {typed}").options
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(("visible", "told"), [("2,3", True), ("0,1", False), ("", True)])
def test_visible_devices_of_the_shell_beat_those_of_the_file_but_not_typed_ones(
    visible: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "launch.yaml", GUIDE, gpu_ids="0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = settled(f"--config_file {path}")
    assert settings.options.gpu_ids is None
    note = f"CUDA_VISIBLE_DEVICES={visible} holds, not gpu_ids: 0,1 ({path}:4)"
    assert settings.notes == ([note] if told else [])
    assert settled(f"--config_file {path} --gpu_ids 1").options.gpu_ids == "1"


def test_a_precision_of_no_is_no_wish_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "launch.yaml", GUIDE, mixed_precision="no")
    assert "ZEROACCEL_MIXED_PRECISION" not in job_of(f"--config_file {path}", devices=2).environment


# --- the guide's three scenarios ------------------------------------------------------------------------------------

NUMBERS = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": False,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    },
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 10,
    "steps_per_print": 2000000,
}
TAMPERED = {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "cpu",
    "offload_param_device": "none",
    "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
    "zero_stage": 2,
}


def write_document(folder: Path, document: dict[str, Any]) -> str:
    """A DeepSpeed config."""
    (folder / "ds_config.json").write_text(json.dumps(document, indent=4))
    return str(folder / "ds_config.json")


def test_scenario_1_fields_beside_a_deepspeed_config_are_named_before_anything_starts(tmp_path: Path) -> None:
    document = write_document(tmp_path, NUMBERS)
    section = {**TAMPERED, "deepspeed_config_file": document}
    path = write(tmp_path / "launch.yaml", GUIDE, deepspeed_config=section)
    result = run((*ZEROACCEL_LAUNCH, "--config_file", path, SCRIPT, str(tmp_path)), tmp_path)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    # gradient_clipping and offload_param_device say the same in both files: they are not ambiguous.
    named = "gradient_accumulation_steps, zero_stage, offload_optimizer_device, zero3_save_16bit_model, mixed_precision"
    assert f"the launch config file sets {named} beside deepspeed_config_file ({document})" in result.err
    assert "`zeroaccel config`" in result.err
    assert f"deepspeed_config_file ({path}:3)" in result.err


def test_scenario_2_a_deepspeed_config_alone_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = write_document(tmp_path, {**NUMBERS, "bf16": {"enabled": "auto"}})
    section = {"deepspeed_config_file": document, "zero3_init_flag": True}
    keys = {name: value for name, value in GUIDE.items() if name != "mixed_precision"}
    path = write(tmp_path / "launch.yaml", keys, deepspeed_config=section)
    plugin = plugin_of(f"--config_file {path}", monkeypatch)
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.gradient_clipping) == (3, 10, 1.0)
    assert plugin.zero3_init_flag is True
    assert plugin.deepspeed_config["zero_optimization"] == NUMBERS["zero_optimization"]


def test_scenario_3_auto_in_the_deepspeed_config_takes_what_was_typed(tmp_path: Path) -> None:
    auto = {
        **NUMBERS,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
        },
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
    }
    section = {"deepspeed_config_file": write_document(tmp_path, auto), "zero3_init_flag": True}
    keys = {**GUIDE, "num_processes": 1, "use_cpu": True}
    del keys["mixed_precision"]
    path = write(tmp_path / "launch.yaml", keys, deepspeed_config=section)
    typed = (
        *("--mixed_precision=fp16", "--zero_stage=3", "--gradient_accumulation_steps=5", "--gradient_clipping=1.0"),
        *("--offload_param_device=cpu", "--offload_optimizer_device=nvme", "--zero3_save_16bit_model=true"),
    )
    script = str(SCRIPTS / "report.py")
    result = run((*ZEROACCEL_LAUNCH, "--config_file", path, *typed, script, str(tmp_path)), tmp_path)
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "rank0.json").read_text())
    assert report["mixed_precision"] == "fp16"
    assert report["accumulation"] == 5
    assert report["config"] == {
        "bf16": {"enabled": False},
        "fp16": {"enabled": True, "auto_cast": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "nvme"},
            "offload_param": {"device": "cpu"},
        },
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 5,
    }


def test_equal_duplicates_are_no_ambiguity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    equal = {"zero_stage": 3, "gradient_accumulation_steps": 10, "gradient_clipping": 1, "offload_param_device": "none"}
    section = {**equal, "deepspeed_config_file": write_document(tmp_path, NUMBERS)}
    path = write(tmp_path / "launch.yaml", GUIDE, mixed_precision="bf16", deepspeed_config=section)
    assert plugin_of(f"--config_file {path}", monkeypatch).zero_stage == 3


def test_a_field_that_is_typed_otherwise_is_no_word_of_the_file(tmp_path: Path) -> None:
    section = {"zero_stage": 2, "deepspeed_config_file": write_document(tmp_path, NUMBERS)}
    path = write(tmp_path / "launch.yaml", GUIDE, mixed_precision="bf16", deepspeed_config=section)
    with pytest.raises(ConfigError, match="sets zero_stage beside"):
        settled(f"--config_file {path}")
    settled(f"--config_file {path} --zero_stage 3")


# --- what cannot start ----------------------------------------------------------------------------------------------

# The file's text (None: there is none): what the one line must hold.
BAD_FILES = {
    None: ["no launch configuration", "launch.yaml"],
    "- a\n- b\n": ["YAML mapping", "a list"],
    "distributed_type: [": ["launch.yaml:", "not valid YAML"],
    "distributed_type: DEEPSPEED\nnum_processes: two\n": ["launch.yaml:2", "num_processes", "'two'", "whole number"],
    "distributed_type: DEEPSPEED\nnum_processes: 0\n": ["launch.yaml:2", "num_processes", "1 or more"],
    "distributed_type: DEEPSPEED\nmain_process_port: 70000\n": ["launch.yaml:2", "0 to 65535"],
    "distributed_type: DEEPSPEED\nnum_procesess: 2\n": [
        "launch.yaml:2",
        "num_procesess",
        "did you mean num_processes?",
    ],
    "distributed_type: FSDP\n": ["launch.yaml:1", "distributed_type", "FSDP"],
    "distributed_type: 'NO'\nrdzv_backend: etcd\n": ["rdzv_backend", "launch.yaml:2", "'etcd'", "static, c10d"],
    "distributed_type: MULTI_GPU\ngpu_ids: 0,1\nuse_cpu: true\n": ["cpu (", "multi_gpu (", "leave one side away"],
    "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: absent.json\n": [
        "deepspeed_config_file (",
        "launch.yaml:3)",
        "absent.json",
    ],
    "distributed_type: DEEPSPEED\nnum_machines: 2\ndeepspeed_config:\n  deepspeed_multinode_launcher: pdsh\n": [
        "deepspeed_multinode_launcher (",
        "launch.yaml:4) pdsh needs --deepspeed_hostfile",
    ],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_one_line_and_status_2(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "launch.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["launch", "--config_file", str(path), SCRIPT]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert all(part in told.err for part in BAD_FILES[text])
