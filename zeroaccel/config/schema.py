"""What DeepSpeed's config may hold, read from DeepSpeed itself: keys at any depth, types, what it refuses.

Keys come from its pydantic models, from what its config class looks up in a dictionary, from the constructors of its
optimizers and schedulers, and from its constants. Nothing is copied but the names of the classes.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import logging
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zeroaccel.config.document import Problem

# Top-level keys that DeepSpeed or MS-AMP reads elsewhere than in its config class.
_READ_ELSEWHERE = frozenset({"sequence_parallel_size", "data_parallel_size", "msamp"})
_WRITTEN_OUT = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
}
# Section -> the model that reads it; sections within have theirs from its annotations.
_MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
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
    "tensor_parallel": "deepspeed.runtime.tensor_parallel.config:TPTrainingConfig",
    "weight_quantization": "deepspeed.inference.config:WeightQuantConfig",
    "timers.throughput": "deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
}
# Section -> the constants by whose names code behind the config class reads what is below it.
_CONSTANTS = {"data_efficiency": "deepspeed.runtime.data_pipeline.constants"}
# Sections whose keys are names of the user's own.
_FREE = ("curriculum_metrics", "arg_mappings")
# Optimizer of the config -> the classes that may become of it, and what DeepSpeed takes out before.
_OPTIMIZERS = {
    "adam": ("deepspeed.ops.adam:FusedAdam", "deepspeed.ops.adam:DeepSpeedCPUAdam"),
    "adagrad": ("deepspeed.ops.adagrad:DeepSpeedCPUAdagrad", "torch.optim:Adagrad"),
    "lamb": ("deepspeed.ops.lamb:FusedLamb",),
    "lion": ("deepspeed.ops.lion:FusedLion", "deepspeed.ops.lion:DeepSpeedCPULion"),
}
_OPTIMIZERS["adamw"] = _OPTIMIZERS["adam"]
_ADAM_SWITCHES = frozenset({"torch_adam", "foreach", "fp32_optimizer_states", "adam_w_mode"})


class _Recorder(dict[str, Any]):
    """A dictionary that remembers which keys were asked for, and with which default."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __bool__(self) -> bool:
        return True

    def keys(self) -> Any:  # DeepSpeed writes `key in config.keys()`
        return self


# --- what DeepSpeed knows ---------------------------------------------------------------------------------------


@functools.cache
def known_keys(section: str) -> frozenset[str] | None:
    """The keys of a section ("" for the top level), or None where DeepSpeed takes any, or has no such section."""
    if section in _WRITTEN_OUT:
        return _WRITTEN_OUT[section]
    if section.endswith(_FREE):
        return None
    if (model := _model(section)) is not None:
        fields = model.model_fields
        return frozenset(fields) | {field.alias for field in fields.values() if field.alias}
    keys = set(_asked(section)) - set(_removed(section))
    if not section:
        return frozenset(keys | _READ_ELSEWHERE)
    top = section.partition(".")[0]
    if top != section and top in _CONSTANTS:
        names = vars(importlib.import_module(_CONSTANTS[top])).values()
        keys |= {name for name in names if isinstance(name, str)}
    if section == "pipeline":
        from deepspeed.runtime.config import get_pipeline_config

        keys |= set(get_pipeline_config({}))
    return frozenset(keys) or None


def _named(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _model(section: str) -> Any:
    """The pydantic model of a section, or None."""
    if section in _MODELS:
        return _named(_MODELS[section])
    outer, _, key = section.rpartition(".")
    if not outer or (model := _model(outer)) is None:
        return None
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            kinds = [field.annotation, *typing.get_args(field.annotation)]
            return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return None


@functools.cache
def _asked(section: str) -> dict[str, Any]:
    """What DeepSpeed's config class looks up there, with its default; empty where it cannot be a section."""
    from deepspeed.runtime.config import DeepSpeedConfig

    whole = inner = _Recorder({"train_micro_batch_size_per_gpu": 1})  # which fits any number of ranks
    for key in section.split(".") if section else ():
        inner[key] = inner = _Recorder({})  # from left to right: into the outer one, then it is the inner one
    with _quiet():
        try:
            DeepSpeedConfig(whole)
        except Exception:  # a number or a text is wanted there
            return {}
    return inner.asked


def _removed(section: str) -> dict[str, str]:
    """Keys that this version of DeepSpeed has given up, with its explanation."""
    from deepspeed.runtime import config

    names = {"": "_REMOVED_TOP_LEVEL_CONFIG_KEYS", "zero_optimization": "_REMOVED_ZERO_CONFIG_KEYS"}
    return getattr(config, names[section], {}) if section in names else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs to stdout what it reads."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- checking ---------------------------------------------------------------------------------------------------


def check(config: Mapping[str, Any], section: str = "") -> list[Problem]:
    """A problem for every key that DeepSpeed does not know, with the nearest one that it does, and every wrong type."""
    problems, usable = _known_part(config, section)
    return problems + _wrong_types(usable, section)


def refusal(config: Mapping[str, Any]) -> list[Problem]:
    """What DeepSpeed's config class says against a config without other problems; it stops at the first one."""
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    decided = {key: value for key, value in _decided(config).items() if key not in batch}
    with _quiet():
        try:
            DeepSpeedConfig({**decided, "train_batch_size": 1})
        except Exception as error:  # of any kind: its parser is one long function
            return [Problem("", f"DeepSpeed refuses this config: {' '.join(str(error).split())}")]
    return []


def _decided(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what is `"auto"`."""
    return {
        key: _decided(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else "remove it"


def _known_part(config: Mapping[str, Any], section: str) -> tuple[list[Problem], dict[str, Any]]:
    """Problems of unknown keys, at any depth, and the config without them."""
    known, removed = known_keys(section), _removed(section)
    problems, usable = [], {}
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if key in removed:
            problems.append(Problem(path, f"{path} cannot be used, remove it: {removed[key].strip()}"))
        elif known is not None and key not in known:
            problems.append(Problem(path, f"{path} is no key that DeepSpeed knows: {_nearest(key, known)}"))
        elif isinstance(value, Mapping):
            below, usable[key] = _known_part(value, path)
            problems += below
        else:
            usable[key] = value
    return problems, usable


def _wrong_types(config: Mapping[str, Any], section: str) -> list[Problem]:
    if (model := _model(section)) is not None:
        return _told_by_model(model, config, section)
    problems = _constructor(section, config) if section in _WRITTEN_OUT else []
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if isinstance(value, Mapping):
            problems += _wrong_types(value, path)
        elif value not in (None, "auto"):
            wanted = _wanted_instead(value, _asked(section).get(key), path)
            problems += [Problem(path, f"{path} is {value!r}: write {wanted}")] if wanted else []
    return problems


def _wanted_instead(value: Any, default: Any, path: str) -> str | None:
    """What a value that DeepSpeed looks up in a dictionary should be, judged by its default; None if it is that."""
    if isinstance(default, bool):
        return None if value in (True, False) and not isinstance(value, float) else "true or false"
    if isinstance(default, (int, float)):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    if isinstance(default, str) and default != "auto":
        return None if isinstance(value, str) else f"a text, such as {default!r}"
    return "a section, {...}, or leave it out" if known_keys(path) is not None else None


def _told_by_model(model: Any, config: Mapping[str, Any], section: str) -> list[Problem]:
    """What one of DeepSpeed's pydantic models finds wrong."""
    from pydantic import ValidationError

    with _quiet():
        try:
            model(**config)
        except ValidationError as error:
            return [_in_our_words(dict(each), section) for each in error.errors()]
        except (AssertionError, ValueError) as error:
            return [Problem(section, f"{section}: {error}")]
    return []


def _in_our_words(error: dict[str, Any], section: str) -> Problem:
    path = ".".join([section, *(str(part) for part in error["loc"] if isinstance(part, str))])
    kind, context = error["type"], error.get("ctx", {})
    wanted = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "string": "a text",
        "path": "a path",
        "list": "a list, [...]",
        "dict": "a section, {...}, or leave it out",
        "model": "a section, {...}, or leave it out",
    }.get(kind.partition("_")[0])
    if kind in ("enum", "literal_error"):
        wanted = f"one of {context['expected']}"
    bound = next((name for name in ("ge", "gt", "le", "lt") if name in context), None)
    if bound is not None:
        wanted = f"a number { {'ge': '>=', 'gt': '>', 'le': '<=', 'lt': '<'}[bound] } {context[bound]}"
    if wanted is None:
        told = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return Problem(path, told if told.startswith(path) else f"{path}: {told}")
    return Problem(path, f"{path} is {error['input']!r}: write {wanted}")


def _constructor(section: str, config: Mapping[str, Any]) -> list[Problem]:
    """An optimizer or scheduler that does not exist, and parameters that it does not take."""
    kind, params = config.get("type"), config.get("params") or {}
    if not isinstance(kind, str) or not isinstance(params, Mapping):
        return []
    accepted = _optimizer_parameters(kind) if section == "optimizer" else _scheduler_parameters(kind)
    if accepted is None:
        names = _optimizer_names() if section == "optimizer" else _scheduler_names()
        path = f"{section}.type"
        return [Problem(path, f"{path} is {kind!r}, which DeepSpeed does not know: {_nearest(kind, names)}")]
    return [
        Problem(path, f"{path} is no parameter of {kind}: {_nearest(name, accepted)}")
        for name in params
        if accepted and name not in accepted and (path := f"{section}.params.{name}")
    ]


def _optimizer_names() -> list[str]:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    own = {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and name != "Optimizer"}
    return [*own, *(name for name in DEEPSPEED_OPTIMIZERS if name not in map(str.lower, own))]


def _optimizer_parameters(kind: str) -> set[str] | None:
    """Names that an optimizer of the config takes; none where they cannot be told; None if there is no such one."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name = kind.lower()
    if name in _OPTIMIZERS:
        accepted = set().union(*(_parameters(_named(path)) for path in _OPTIMIZERS[name]))
        return accepted | _ADAM_SWITCHES if name.startswith("adam") else accepted
    if name in DEEPSPEED_OPTIMIZERS:
        return set()
    return _parameters(_named(f"torch.optim:{kind}")) if kind in _optimizer_names() else None


def _scheduler_names() -> list[str]:
    from deepspeed.runtime import lr_schedules

    return list(lr_schedules.VALID_LR_SCHEDULES)


def _scheduler_parameters(kind: str) -> set[str] | None:
    """The same for schedulers, of DeepSpeed or PyTorch."""
    for module in ("deepspeed.runtime.lr_schedules", "torch.optim.lr_scheduler"):
        if inspect.isclass(found := getattr(importlib.import_module(module), kind, None)):
            return _parameters(found)
    return None


def _parameters(constructor: Any) -> set[str]:
    """What a constructor takes beside the parameters or the optimizer that it is about."""
    return set(list(inspect.signature(constructor).parameters)[1:])
