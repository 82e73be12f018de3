"""The schema of the launch configuration: Accelerate's, with the keys of each of its versions since 0.5.

A key of the file sets an option of `zeroaccel launch`, or is understood and says nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zeroaccel.config import environment
from zeroaccel.config.constants import DEEPSPEED_MULTINODE_LAUNCHERS, TORCH_DYNAMO_MODES
from zeroaccel.config.types import DynamoBackend, PrecisionType


@dataclass(frozen=True)
class Kind:
    """What a key may hold.

    Attributes:
        wanted: the same in words, for the error.
        convert: the option's value; None where the file's value says nothing.

    Raises:
        ValueError: by `convert`, on anything else.
    """

    wanted: str
    convert: Callable[[Any], Any]


@dataclass(frozen=True)
class Key:
    """A key of the file: the launcher's option that it sets, and what it may hold."""

    option: str
    kind: Kind


def _number(kind: type[int] | type[float], lowest: int, highest: int | None = None, nothing: Any = None) -> Kind:
    """A number within bounds, both included, also where it is quoted; `nothing` stands for no number."""
    noun = "a whole number" if kind is int else "a number"

    def convert(value: Any) -> int | float | None:
        if value == nothing:
            return None
        number = kind(str(value))
        if not number >= lowest or (highest is not None and number > highest):
            raise ValueError
        return number

    return Kind(f"{noun}, {lowest} or more" if highest is None else f"{noun}, {lowest} to {highest}", convert)


def _truth(value: Any) -> bool:
    if not isinstance(value, (bool, str, int)):
        raise ValueError
    return environment.parse_bool(str(value), "")


def _text(value: Any) -> str | None:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError
    return None if value in ("", "none") else str(value)


def _choice(choices: list[str], fold: Callable[[str], str]) -> Kind:
    def convert(value: Any) -> str:
        # YAML reads an unquoted `no` as false.
        folded = fold("no" if value is False else str(value))
        if folded not in choices:
            raise ValueError
        return folded

    return Kind(f"one of {', '.join(choices)}", convert)


_BOOLEAN = Kind("true or false", _truth)
# An option without a value: it can be typed, but not denied, so that false says nothing.
_FLAG = Kind("true or false", lambda value: _truth(value) or None)
_TEXT = Kind("text", _text)
_DEVICE = _choice(["none", "cpu", "nvme"], str.lower)
_BACKEND = _choice(DynamoBackend.list(), str.upper)
_DYNAMO = {
    "dynamo_backend": _BACKEND,
    "dynamo_mode": _choice(TORCH_DYNAMO_MODES, str.lower),
    "dynamo_use_dynamic": _FLAG,
    "dynamo_use_fullgraph": _FLAG,
    "dynamo_use_regional_compilation": _FLAG,
}


def _keys(kinds: Mapping[str, Kind]) -> dict[str, Key]:
    """Keys that are called like their options."""
    return {name: Key(name, kind) for name, kind in kinds.items()}


# Section ("" for the top level) -> its keys.
SCHEMA: dict[str, dict[str, Key]] = {
    "": {
        "fp16": Key(
            "mixed_precision", Kind("true or false", lambda value: "fp16" if _truth(value) else None)
        ),  # to 0.7
        "use_cpu": Key("cpu", _FLAG),
        **_keys(
            {
                "debug": _FLAG,
                "dynamo_backend": _BACKEND,  # up to 0.17
                "enable_cpu_affinity": _FLAG,
                "gpu_ids": _TEXT,
                "machine_rank": _number(int, 0),
                "main_process_ip": _TEXT,
                "main_process_port": _number(int, 0, 65535),
                "mixed_precision": _choice(PrecisionType.list(), str.lower),
                "num_machines": _number(int, 1),
                "num_processes": _number(int, 1, nothing=-1),  # -1: to be typed at launch
                "rdzv_backend": _choice(["static", "c10d"], str.lower),
                "same_network": _FLAG,
            }
        ),
    },
    "deepspeed_config": _keys(
        {
            "auto_policy": _choice(["fast", "accelerate"], str.lower),  # ours alone; Accelerate hands it on unread
            "deepspeed_config_file": _TEXT,
            "deepspeed_exclusion_filter": _TEXT,
            "deepspeed_hostfile": _TEXT,
            "deepspeed_inclusion_filter": _TEXT,
            "deepspeed_moe_layer_cls_names": _TEXT,
            "deepspeed_multinode_launcher": _choice(DEEPSPEED_MULTINODE_LAUNCHERS, str.lower),
            "gradient_accumulation_steps": _number(int, 1, nothing="auto"),
            "gradient_clipping": _number(float, 0, nothing="auto"),
            "offload_optimizer_device": _DEVICE,
            "offload_optimizer_nvme_path": _TEXT,
            "offload_param_device": _DEVICE,
            "offload_param_nvme_path": _TEXT,
            "zero3_init_flag": _BOOLEAN,
            "zero3_save_16bit_model": _BOOLEAN,
            "zero_stage": _number(int, 0, 3),
        }
    ),
    "dynamo_config": {
        **_keys(_DYNAMO),
        **{name.removeprefix("dynamo_"): Key(name, kind) for name, kind in _DYNAMO.items()},  # both are read
    },
}

# Keys that speak to what `distributed_type` did not choose, or to what is the same here whatever they say.
INERT = frozenset(
    {
        "command_file",
        "commands",
        "downcast_bf16",
        "fp8_config",
        "fsdp_config",
        "ipex_config",
        "main_training_function",
        "megatron_lm_config",
        "tpu_env",
        "tpu_name",
        "tpu_use_cluster",
        "tpu_use_sudo",
        "tpu_vm",
        "tpu_zone",
    }
)
# Keys that are looked at as a whole: they choose, or they ask for what cannot be had.
_OTHER = {"compute_environment", "distributed_type", "mpirun_config", "parallelism_config", "tp_config"}
TOP_LEVEL = frozenset({*SCHEMA[""], *SCHEMA, *INERT, *_OTHER} - {""})

# What each `distributed_type` says to the launcher. Devices that DeepSpeed finds by itself need no word.
TYPES: dict[str, dict[str, Any]] = {
    "NO": {},
    "DEEPSPEED": {"use_deepspeed": True},
    "MULTI_GPU": {"multi_gpu": True},
    "MULTI_CPU": {"cpu": True},
    **{f"MULTI_{device}": {} for device in ("NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU", "NEURON")},
}
OTHER_TYPES = frozenset({"FSDP", "MEGATRON_LM", "XLA", "TPU"})

# Option -> section and key that a new file gives it in.
PLACES = {
    key.option: (section, name)
    for section, keys in SCHEMA.items()
    for name, key in keys.items()
    if name in (key.option, "use_cpu")
}
# What a new file says where nobody was asked; Accelerate's own values.
DEFAULTS: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "num_machines": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
# What Accelerate reads into a file that does not say it, where that is not what a new file says.
UNSAID = {"same_network": False}
