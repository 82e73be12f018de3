"""`report.py FOLDER ...`: each rank writes what `Accelerator()` and its plugin made of the launcher's options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zeroaccel import Accelerator

PLUGIN_FIELDS = (
    "zero_stage",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "auto_policy",
)
CONFIG_KEYS = ("fp16", "bf16", "zero_optimization", "gradient_clipping", "gradient_accumulation_steps")


def main() -> None:
    """Writes `rank<N>.json`."""
    accelerator = Accelerator()
    plugin, config = accelerator.deepspeed_plugin, accelerator.deepspeed_config or {}
    report = {
        "arguments": sys.argv[1:],
        "world_size": accelerator.num_processes,
        "device": accelerator.device.type,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "accumulation": accelerator.gradient_accumulation_steps,
        "debug": accelerator.state.debug,
        "plugin": plugin and {name: getattr(plugin, name) for name in PLUGIN_FIELDS},
        "config": {key: config.get(key) for key in CONFIG_KEYS},
    }
    Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main()
