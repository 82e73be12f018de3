"""Launch configurations as objects, for programs that read or write them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from zeroaccel.config import launch_file
from zeroaccel.config.types import ComputeEnvironment, DistributedType
from zeroaccel.errors import UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self

default_config_file = default_json_config_file = default_yaml_config_file = launch_file.default_path()
cache_dir = os.path.dirname(default_config_file)


@dataclass
class BaseConfig:
    """What every launch configuration says; reads and writes files."""

    compute_environment: ComputeEnvironment
    distributed_type: DistributedType
    mixed_precision: str | None
    use_cpu: bool
    debug: bool

    def __post_init__(self) -> None:
        self.compute_environment = ComputeEnvironment(self.compute_environment)
        self.distributed_type = DistributedType(self.distributed_type)

    @classmethod
    def from_yaml_file(cls, yaml_file: str | None = None) -> Self:
        """Reads a file, YAML or JSON, of any version; default: the one that `zeroaccel launch` reads.

        Raises:
            ConfigError: `zeroaccel launch` would refuse it.
        """
        document = launch_file.document(launch_file.default_path() if yaml_file is None else yaml_file)
        unsaid = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": None, "use_cpu": False, "debug": False}
        return cls(**{**unsaid, **document})

    from_json_file = from_yaml_file

    def to_dict(self) -> dict[str, Any]:
        """What a file would say: texts in place of enumerations, and no key without a value."""
        said = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}
        return {name: value.value if isinstance(value, Enum) else value for name, value in said.items()}

    def to_yaml_file(self, yaml_file: str) -> None:
        """Writes a file that `zeroaccel launch --config_file` reads.

        Raises:
            ConfigError: it cannot be written there.
        """
        launch_file.dump(yaml_file, self.to_dict(), as_json=False)

    def to_json_file(self, json_file: str) -> None:
        """The same as JSON."""
        launch_file.dump(json_file, self.to_dict(), as_json=True)


@dataclass
class ClusterConfig(BaseConfig):
    """A launch configuration, key by key; `config/launch_schema.py` says what the keys mean.

    Keys of what this library does not do are there because files of Accelerate have them.
    """

    num_processes: int = -1
    machine_rank: int = 0
    num_machines: int = 1
    gpu_ids: str | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    rdzv_backend: str | None = "static"
    same_network: bool | None = False
    main_training_function: str = "main"
    enable_cpu_affinity: bool = False
    fp8_config: dict[str, Any] | None = field(default_factory=dict)
    deepspeed_config: dict[str, Any] | None = field(default_factory=dict)
    fsdp_config: dict[str, Any] | None = field(default_factory=dict)
    parallelism_config: dict[str, Any] | None = field(default_factory=dict)
    megatron_lm_config: dict[str, Any] | None = field(default_factory=dict)
    mpirun_config: dict[str, Any] | None = field(default_factory=dict)
    downcast_bf16: bool | str = False
    tpu_name: str | None = None
    tpu_zone: str | None = None
    tpu_use_cluster: bool = False
    tpu_use_sudo: bool = False
    command_file: str | None = None
    commands: list[str] | None = None
    tpu_vm: list[str] | None = None
    tpu_env: list[str] | None = None
    dynamo_config: dict[str, Any] | None = field(default_factory=dict)


class SageMakerConfig(BaseConfig):
    """Refused: SageMaker starts ranks by itself."""

    def __init__(self, **options: Any) -> None:
        raise UnsupportedError("SageMakerConfig: run the script with `zeroaccel launch` inside of the job")


def load_config_from_file(config_file: str | None) -> ClusterConfig:
    """Reads a launch configuration, YAML or JSON; None: the one that `zeroaccel launch` reads.

    Raises:
        ConfigError: `zeroaccel launch` would refuse it.
    """
    return ClusterConfig.from_yaml_file(config_file)
