"""The keys that DeepSpeed knows, read from DeepSpeed itself, so that a misspelt one is an error and not ignored."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping
from typing import Any

# Top-level keys that DeepSpeed or MS-AMP reads elsewhere than in its config class.
_READ_ELSEWHERE = frozenset({"sequence_parallel_size", "data_parallel_size", "msamp"})
_WRITTEN_OUT = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
}
# Section -> the model that reads it.
_SECTION_MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.zenflow": "deepspeed.runtime.zenflow.zenflow_config:ZenFlowConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "bfloat16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "hybrid_engine": "deepspeed.runtime.config:HybridEngineConfig",
}


class _Recorder(dict[str, Any]):
    """A dictionary that remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed writes `key in config.keys()`
        return self


@functools.cache
def known_keys(section: str) -> frozenset[str] | None:
    """The keys of a section ("" for the top level), or None where DeepSpeed takes any."""
    if section in _WRITTEN_OUT:
        return _WRITTEN_OUT[section]
    if section in _SECTION_MODELS:
        module, name = _SECTION_MODELS[section].split(":")
        fields = getattr(importlib.import_module(module), name).model_fields
        return frozenset(fields) | {field.alias for field in fields.values() if field.alias}
    if "." in section:
        return None
    asked = _asked_by_deepspeed(section) - set(_removed(section))
    if not section:
        return frozenset(asked | _READ_ELSEWHERE)
    return frozenset(asked) or None


def _asked_by_deepspeed(section: str) -> set[str]:
    """What DeepSpeed's config class looks up there."""
    from deepspeed.runtime.config import DeepSpeedConfig

    whole = _Recorder({"train_batch_size": 1})
    asked = whole.asked
    if section:
        whole[section] = inner = _Recorder({})
        asked = inner.asked
    DeepSpeedConfig(whole)
    return asked


def _removed(section: str) -> dict[str, str]:
    """Keys that this version of DeepSpeed has given up, with its explanation."""
    from deepspeed.runtime import config

    names = {"": "_REMOVED_TOP_LEVEL_CONFIG_KEYS", "zero_optimization": "_REMOVED_ZERO_CONFIG_KEYS"}
    return getattr(config, names[section], {}) if section in names else {}


def check(config: Mapping[str, Any], section: str = "") -> list[str]:
    """A line for every key that DeepSpeed does not know, with the nearest one that it does."""
    known, removed, problems = known_keys(section), _removed(section), []
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if key in removed:
            problems.append(f"{path} cannot be used, remove it: {removed[key].strip()}")
        elif known is not None and key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "remove it"
            problems.append(f"{path} is no key that DeepSpeed knows: {remedy}")
        elif isinstance(value, Mapping):
            problems += check(value, path)
    return problems
