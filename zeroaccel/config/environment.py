"""The only place where the library reads environment variables.

Ours begin with `ZEROACCEL_`. One that Accelerate's launcher exported (`ACCELERATE_` and the same rest) is the
fallback, so that a script runs under `accelerate launch` as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zeroaccel.errors import ConfigError

PREFIX = "ZEROACCEL_"
FALLBACK_PREFIX = "ACCELERATE_"

# What `accelerate launch` exports though nobody typed it: no wish of the user's (docs/design.md).
UNTYPED_FALLBACKS = {"GRADIENT_ACCUMULATION_STEPS": "1", "MIXED_PRECISION": "no"}

# Launcher option or plugin field -> rest of the variable's name. `zeroaccel launch` writes them, the library reads.
FIELDS = {
    "use_deepspeed": "USE_DEEPSPEED",
    "cpu": "USE_CPU",
    "mixed_precision": "MIXED_PRECISION",
    "dynamo_backend": "DYNAMO_BACKEND",
    "dynamo_mode": "DYNAMO_MODE",
    "dynamo_use_fullgraph": "DYNAMO_USE_FULLGRAPH",
    "dynamo_use_dynamic": "DYNAMO_USE_DYNAMIC",
    "dynamo_use_regional_compilation": "DYNAMO_USE_REGIONAL_COMPILATION",
    "zero_stage": "DEEPSPEED_ZERO_STAGE",
    "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "GRADIENT_CLIPPING",
    "offload_optimizer_device": "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "offload_optimizer_nvme_path": "DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "offload_param_nvme_path": "DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    "zero3_init_flag": "DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "DEEPSPEED_CONFIG_FILE",
    "deepspeed_fields_from_config": "CONFIG_DS_FIELDS",
    "deepspeed_moe_layer_cls_names": "DEEPSPEED_MOE_LAYER_CLS_NAMES",
    "auto_policy": "AUTO_POLICY",
    "debug": "DEBUG_MODE",
    "cpu_affinity": "CPU_AFFINITY",  # the launcher to its own ranks: bind yourself to your share of the cores
    "ranks_from": "RANKS_FROM",  # "slurm": no launcher but SLURM numbers the ranks
}

_TRUE = {"1", "true", "t", "yes", "y", "on"}
_FALSE = {"0", "false", "f", "no", "n", "off", ""}


@dataclass(frozen=True)
class Setting:
    """A variable that is set: its text and its full name."""

    value: str
    variable: str


def lookup(name: str) -> Setting | None:
    """The variable `ZEROACCEL_<name>`, else `ACCELERATE_<name>`, else None. An empty one counts as not set."""
    for prefix in (PREFIX, FALLBACK_PREFIX):
        value = os.environ.get(prefix + name)
        if value is None or value == "":
            continue
        if prefix == FALLBACK_PREFIX and UNTYPED_FALLBACKS.get(name) == value:
            continue
        return Setting(value, prefix + name)
    return None


def text(name: str) -> str | None:
    """Value of a variable, or None."""
    setting = lookup(name)
    return None if setting is None else setting.value


def flag(name: str, default: bool = False) -> bool:
    """A variable that is true or false.

    Raises:
        ConfigError: the text means neither.
    """
    setting = lookup(name)
    if setting is None:
        return default
    return parse_bool(setting.value, setting.variable)


def of_another_tool(variable: str) -> str | None:
    """A variable that another tool defined, by its full name. An empty one counts as not set."""
    return os.environ.get(variable) or None


def parse_bool(value: str, origin: str) -> bool:
    """True or false from what people write: 1, true, yes, on and their opposites."""
    lowered = value.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ConfigError(f"{origin} is {value!r}, which is neither true nor false: write true or false")


def parse_whole(value: str, origin: str, lowest: int) -> int:
    """A whole number of at least `lowest`.

    Raises:
        ConfigError: the text is none.
    """
    if not value.strip().isdigit() or int(value) < lowest:
        raise ConfigError(f"{origin} is {value!r}: write a whole number of at least {lowest}")
    return int(value)


def is_true(value: str) -> bool:
    """True for "true" in any case, false for all else, as launchers write it."""
    return value.strip().lower() == "true"


def exports(values: Mapping[str, object]) -> dict[str, str]:
    """The variables by which a launcher hands `values` on to the ranks.

    Args:
        values: names of `FIELDS` and what the user wants there; None is left out.
    """
    spelled = {True: "true", False: "false"}
    return {
        PREFIX + FIELDS[name]: spelled[value] if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value is not None
    }


@dataclass(frozen=True)
class Ranks:
    """What the launcher says about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


CPUInformation = Ranks  # Accelerate's name

_RANK_VARIABLES: dict[str, tuple[str, ...]] = {
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "world_size": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local_rank": (
        "LOCAL_RANK",
        "MPI_LOCALRANKID",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    "local_world_size": (
        "LOCAL_WORLD_SIZE",
        "MPI_LOCALNRANKS",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
}
_SLURM_VARIABLES = {"rank": "SLURM_PROCID", "world_size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}


def _rank_variables() -> dict[str, tuple[str, ...]]:
    """Where ranks may be announced. SLURM's variables also stand in a shell inside an allocation, which is no rank."""
    if text(FIELDS["ranks_from"]) != "slurm":
        return _RANK_VARIABLES
    return _RANK_VARIABLES | {name: (*_RANK_VARIABLES[name], of_slurm) for name, of_slurm in _SLURM_VARIABLES.items()}


def _first_int(names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = os.environ.get(name)
        if value:
            return parse_whole(value, name, lowest=0)
    return default


def launched_ranks() -> Ranks | None:
    """Ranks that torchrun, DeepSpeed's launcher or MPI announced; None if this process was started alone."""
    variables = _rank_variables()
    if not any(os.environ.get(name) for name in variables["world_size"]):
        return None
    world_size = _first_int(variables["world_size"], 1)
    rank = _first_int(variables["rank"], 0)
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=_first_int(variables["local_rank"], rank),
        local_world_size=_first_int(variables["local_world_size"], world_size),
    )


def get_cpu_distributed_information() -> Ranks:
    """Ranks as the launcher announced them, or those of a process that was started alone."""
    return launched_ranks() or Ranks()


def announce_ranks(ranks: Ranks) -> None:
    """Writes the variables that DeepSpeed reads at initialization, where the launcher left them out."""
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))


def has_master() -> bool:
    """Whether the launcher said where the ranks meet."""
    return bool(os.environ.get("MASTER_ADDR")) and bool(os.environ.get("MASTER_PORT"))


def add_to_path(folder: str) -> None:
    """Has programs of a folder found by this process, after all others."""
    os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), folder)))


def choose_cpu_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, to leave this machine's GPUs alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
