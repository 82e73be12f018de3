"""Who wins when a value is given twice. The one table that code, tests and `explain()` read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# From strongest to weakest. For mixed precision "Accelerator argument" beats "launcher".
PRECEDENCE = ("DeepSpeed config", "plugin argument", "launcher", "Accelerator argument", "rule")

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

# What a DeepSpeed config file without gradient_accumulation_steps means.
MISSING_STEPS = 1


@dataclass(frozen=True)
class Source:
    """Where a plugin field's value comes from.

    Attributes:
        name: in words, or the environment variable.
        typed: whether somebody asked for the value; a default that loses is not worth a warning.
    """

    name: str
    typed: bool

    def shown(self, field: str) -> str:
        """For messages."""
        return f"DeepSpeedPlugin({field}=...)" if self is ARGUMENT else self.name


ARGUMENT = Source("plugin argument", typed=True)
DEFAULT = Source("default", typed=False)


def losers_warning(losers: Sequence[tuple[str, Any, str, Any, str]]) -> str:
    """One warning for values that were given twice.

    Args:
        losers: key, the value that holds, its source, the value that lost, its source.
    """
    lines = [f"{key}: {value!r} ({source}) holds, not {lost!r} ({loser})" for key, value, source, lost, loser in losers]
    return "values given twice: " + "; ".join(lines)
