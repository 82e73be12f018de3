"""Who wins when a value is given twice. The one table that code, tests and `explain()` read."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from zeroaccel.config import environment
from zeroaccel.config.types import PrecisionType
from zeroaccel.errors import ConfigError


class Level(Enum):
    """Where a value can be given."""

    DOCUMENT = "number in the DeepSpeed config"
    PLUGIN = "plugin argument"
    LAUNCHER = "launcher"
    ACCELERATOR = "Accelerator argument"
    RULE = "rule"  # and defaults: nobody typed it, so nobody is told when it loses


# From strongest to weakest, and for the value where the order is another one.
PRECEDENCE = (Level.DOCUMENT, Level.PLUGIN, Level.LAUNCHER, Level.ACCELERATOR, Level.RULE)
EXCEPTIONS = {
    "mixed_precision": (Level.DOCUMENT, Level.ACCELERATOR, Level.LAUNCHER, Level.RULE),
}

# Plugin field -> key of the DeepSpeed config.
FIELD_KEYS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}

# What a DeepSpeed config without the key means: DeepSpeed's own default. Not so for clipping, which DeepSpeed 0.19.8
# does at 1.0 uninvited: a config without it leaves it open, as "auto" does.
WITHOUT_KEY: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "zero_optimization.stage": 0,
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.device": "none",
    "zero_optimization.offload_param.nvme_path": "none",
    "zero_optimization.offload_optimizer.nvme_path": "none",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
}


@dataclass(frozen=True)
class Said:
    """A value that somebody gave.

    Attributes:
        value: what.
        level: where.
        source: the place in words, e.g. `ds_config.json:3` or the environment variable.
    """

    value: Any
    level: Level
    source: str


def settle(name: str, said: Iterable[Said]) -> tuple[Said, list[str]]:
    """The value that holds, and a line for each other one that was typed and is unequal.

    Args:
        name: of the value, for the table and for the lines.
        said: every value that was given; at least one.
    """
    order = EXCEPTIONS.get(name, PRECEDENCE)
    winner, *others = sorted(said, key=lambda each: order.index(each.level))
    held = f"{name}: {reprlib.repr(winner.value)} ({winner.source}) holds"
    return winner, [
        f"{held}, not {reprlib.repr(other.value)} ({other.source})"
        for other in others
        if other.level is not Level.RULE and other.value not in (winner.value, "auto")
    ]


def warn_losers(lines: Sequence[str]) -> None:
    """One warning for all values that were given twice."""
    if lines:
        remedy = 'give each once, and write "auto" in the DeepSpeed config for a value that is given elsewhere'
        warnings.warn(f"{'; '.join(lines)}: {remedy}", stacklevel=4)


def choose_mixed_precision(argument: str | None) -> Said:
    """What the `Accelerator` argument, else the launcher, says; "no" where neither does.

    Raises:
        ConfigError: there is no such precision.
    """
    said = [Said(PrecisionType.NO.value, Level.RULE, "default")]
    if argument is not None:
        said.append(Said(str(argument).lower(), Level.ACCELERATOR, "Accelerator(mixed_precision=...)"))
    if (setting := environment.lookup(environment.FIELDS["mixed_precision"])) is not None:
        said.append(Said(setting.value.lower(), Level.LAUNCHER, setting.variable))
    for each in said:
        if each.value not in PrecisionType:
            raise ConfigError(
                f"mixed_precision={each.value!r} ({each.source}) is unknown: choose from {PrecisionType.list()}"
            )
    chosen, losers = settle("mixed_precision", said)
    warn_losers(losers)
    return chosen
