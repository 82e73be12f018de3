"""What programs import from `accelerate.commands` is here under the same path; launch configurations as objects."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config import config_args as accelerates

from tests.commands.runs import PROGRAMS
from tests.commands.settled import SCRIPT, nothing_launched
from zeroaccel.commands.config import config_args
from zeroaccel.commands.config.config_args import ClusterConfig, load_config_from_file
from zeroaccel.commands.launch import _validate_launch_command, launch_command_parser
from zeroaccel.config import launch_file
from zeroaccel.config.types import DistributedType
from zeroaccel.errors import ConfigError, UnsupportedError

__all__ = ["nothing_launched"]

# Module below `commands` -> names.
IMPORTED = {
    "config": "default_config_file load_config_from_file main",
    "config.config_args": "BaseConfig ClusterConfig SageMakerConfig cache_dir default_config_file"
    " default_json_config_file default_yaml_config_file load_config_from_file",
    "config.default": "write_basic_config",
    "env": "env_command env_command_parser main",
    "estimate": "estimate_command estimate_command_parser gather_data main",
    "launch": "_validate_launch_command launch_command launch_command_parser main",
    "merge": "main merge_command merge_command_parser",
    "test": "main test_command test_command_parser",
}


@pytest.mark.parametrize("module", IMPORTED)
def test_what_programs_import_is_under_the_same_path(module: str) -> None:
    theirs, ours = (importlib.import_module(f"{package}.commands.{module}") for package in ("accelerate", "zeroaccel"))
    for name in IMPORTED[module].split():
        assert hasattr(theirs, name)
        assert hasattr(ours, name)


@pytest.mark.parametrize("name", ["config", "estimate-memory", "launch", "merge-weights"])
def test_a_command_is_a_program_as_with_accelerate(name: str) -> None:
    assert (PROGRAMS / f"accelerate-{name}").exists()
    done = subprocess.run([PROGRAMS / f"zeroaccel-{name}", "--nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"zeroaccel {name}: error: ")


# --- launch configurations as objects ---------------------------------------------------------------------------

FILE = """
compute_environment: LOCAL_MACHINE
debug: true
deepspeed_config: {gradient_accumulation_steps: 4, zero3_init_flag: true, zero_stage: 3}
distributed_type: DEEPSPEED
downcast_bf16: 'no'
fsdp_config: {}
mixed_precision: bf16
num_machines: 1
num_processes: 2
tpu_env: []
use_cpu: false
"""
# Of versions of long ago.
OLD = """
compute_environment: LOCAL_MACHINE
deepspeed_config: {zero_stage: 2}
distributed_type: DEEPSPEED
dynamo_backend: INDUCTOR
fp16: true
num_processes: 2
"""


@pytest.mark.parametrize("text", [FILE, OLD])
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_file_is_read_as_accelerate_reads_it(text: str, ending: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"launch.{ending}")
    Path(path).write_text(text if ending == "yaml" else json.dumps(yaml.safe_load(text)))
    loaded = load_config_from_file(path)
    assert loaded.distributed_type is DistributedType.DEEPSPEED
    assert loaded.to_dict() == accelerates.load_config_from_file(path).to_dict()


def test_the_fields_are_accelerates() -> None:
    def told(kind: Any) -> list[tuple[str, Any]]:
        empty = kind("LOCAL_MACHINE", "NO", "no", False, False)
        return [(each.name, getattr(empty, each.name)) for each in dataclasses.fields(kind)]

    assert told(ClusterConfig) == told(accelerates.ClusterConfig)


def test_sagemaker_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="SageMakerConfig: run the script with `zeroaccel launch`"):
        config_args.SageMakerConfig(ec2_instance_type="ml.p3.16xlarge")


def test_what_is_written_is_read_by_launch(tmp_path: Path) -> None:
    config = ClusterConfig(
        "LOCAL_MACHINE",  # type: ignore[arg-type]
        DistributedType.DEEPSPEED,
        mixed_precision="bf16",
        use_cpu=True,
        debug=False,
        num_processes=2,
        deepspeed_config={"zero_stage": 1},
    )
    for write, name in ((config.to_yaml_file, "a.yaml"), (config.to_json_file, "b.json")):
        path = str(tmp_path / name)
        write(path)
        told = launch_file.read(path)
        assert (told["cpu"], told["mixed_precision"], told["num_processes"], told["zero_stage"]) == (True, "bf16", 2, 1)
        assert load_config_from_file(path) == config


def test_the_default_file_and_what_launch_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZEROACCEL_HOME", str(tmp_path))
    (tmp_path / "default_config.yaml").write_text(FILE.replace("num_processes", "num_procs"))
    with pytest.raises(ConfigError, match="did you mean num_processes"):
        load_config_from_file(None)
    (tmp_path / "default_config.yaml").write_text(FILE)
    assert load_config_from_file(None).num_processes == 2
    importlib.reload(config_args)
    assert config_args.default_config_file == os.path.join(config_args.cache_dir, "default_config.yaml")


def test_a_program_sees_the_options_with_the_launch_configuration(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(FILE)
    typed = launch_command_parser().parse_args(["--config_file", str(path), "--zero_stage", "1", SCRIPT])
    args, defaults, precision_of_the_file = _validate_launch_command(typed)
    assert args is typed
    assert (args.zero_stage, args.num_processes, args.debug, args.mixed_precision) == (1, 2, True, "bf16")
    assert precision_of_the_file
    assert defaults is not None
    assert defaults.deepspeed_config == {"gradient_accumulation_steps": 4, "zero3_init_flag": True, "zero_stage": 3}
    alone = launch_command_parser().parse_args(["--cpu", "--multi_gpu", "anywhere.py"])
    with pytest.raises(ConfigError, match="--cpu leaves the GPUs alone"):
        _validate_launch_command(alone)
