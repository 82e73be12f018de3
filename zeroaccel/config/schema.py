"""The keys that DeepSpeed knows, read from DeepSpeed itself, so that a misspelt one is an error and not ignored."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

# Modules whose string constants name top-level keys.
_KEY_MODULES = (
    "deepspeed.runtime.constants",
    "deepspeed.runtime.data_pipeline.constants",
    "deepspeed.autotuning.constants",
    "deepspeed.elasticity.constants",
    "deepspeed.compression.constants",
    "deepspeed.profiling.constants",
    "deepspeed.runtime.swap_tensor.constants",
    "deepspeed.runtime.activation_checkpointing.config",
    "deepspeed.runtime.zero.config",
    "deepspeed.runtime.precision_config",
    "deepspeed.runtime.model_checkpointing.constants",
    "deepspeed.nebula.constants",
    "deepspeed.utils.config",
)
# Top-level keys that DeepSpeed, or the libraries on top of it, write as plain text in their code.
_WRITTEN_KEYS = {
    "zero_optimization", "fp16", "bf16", "amp", "bfloat16", "compile", "tensor_parallel", "expert_parallel", "pipeline",
    "hybrid_engine", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "aio", "msamp", "data_types",
    "checkpoint", "weight_quantization", "compression_training", "data_efficiency", "curriculum_learning", "elasticity",
    "autotuning", "flops_profiler", "activation_checkpointing", "sparse_attention", "timers", "nebula",
    "monitor_config", "sequence_parallel_size", "data_parallel_size", "torch_autocast",
    "use_data_before_expert_parallel",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "eigenvalue", "progressive_layer_drop",
    "quantize_training", "load_universal_checkpoint", "use_node_local_storage", "vocabulary_size",
    "sub_group_size", "communication_data_type", "deepcompile", "inference", "moe",
}  # fmt: skip
# Section -> the model that reads it.
_SECTION_MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.zenflow": "deepspeed.runtime.zenflow.zenflow_config:ZenFlowConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "hybrid_engine": "deepspeed.runtime.config:HybridEngineConfig",
}
_OPTIMIZER_KEYS = frozenset({"type", "params", "legacy_fusion"})
_SCHEDULER_KEYS = frozenset({"type", "params"})


@functools.cache
def known_keys(section: str) -> frozenset[str] | None:
    """The keys of a section ("" for the top level), or None where DeepSpeed takes any."""
    if section == "":
        return frozenset(_WRITTEN_KEYS | set(_constants()))
    if section in ("optimizer", "scheduler"):
        return _OPTIMIZER_KEYS if section == "optimizer" else _SCHEDULER_KEYS
    if section not in _SECTION_MODELS:
        return None
    module, name = _SECTION_MODELS[section].split(":")
    fields = getattr(importlib.import_module(module), name).model_fields
    # fp16.auto_cast and the like are fields too; aliases are what users write.
    return frozenset(fields) | {field.alias for field in fields.values() if field.alias}


def _constants() -> Iterator[str]:
    for name in _KEY_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not in every version of DeepSpeed
            continue
        for value in vars(module).values():
            if isinstance(value, str) and value.isidentifier() and value == value.lower():
                yield value


def check(config: Mapping[str, Any], section: str = "") -> list[str]:
    """A line for every key that DeepSpeed does not know, with the nearest one that it does."""
    known, problems = known_keys(section), []
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if known is not None and key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "remove it"
            problems.append(f"{path} is no key that DeepSpeed knows: {remedy}")
        elif isinstance(value, Mapping):
            problems += check(value, path)
    return problems
