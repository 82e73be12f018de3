"""Optimizers whose state lies in CPU memory or on NVMe: DeepSpeed's C++ version where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zeroaccel.engine import ops
from zeroaccel.errors import ConfigError
from zeroaccel.logging import library_logger

logger = library_logger(__name__)

# Their rule needs a parameter's shape; ZeRO hands them flat partitions.
SHAPE_DEPENDENT = ("Adafactor", "Muon", "Shampoo", "SOAP")


def refuse_unshardable(optimizer: torch.optim.Optimizer, stage: int) -> None:
    """Refuses an optimizer that could not step, or would silently follow another rule on flat partitions.

    Raises:
        ConfigError: it is LBFGS, or one of `SHAPE_DEPENDENT` where the stage partitions its state.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            f"{name} evaluates the loss several times a step, which DeepSpeed cannot do: use another optimizer"
        )
    if stage >= 1 and name in SHAPE_DEPENDENT:
        raise ConfigError(
            f"{name} needs whole parameters, but ZeRO stage {stage} hands an optimizer flat slices of them, on which it"
            " would compute something else: use zero_stage=0, or another optimizer"
        )


def cpu_version(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """DeepSpeed's CPU optimizer with the same rule, hyper-parameters and param groups, or None.

    Args:
        optimizer: the user's; `torch.optim.Adam`, `AdamW` and `Adagrad` (and bitsandbytes' 32-bit ones) have a version.
    """
    kind = _same_rule(optimizer)
    if kind is None:
        return None
    names = ("lr", "eps", "weight_decay") if kind == "Adagrad" else ("lr", "betas", "eps", "weight_decay")
    # What a scheduler or the script keeps in a group (`initial_lr`, `max_lr`, `name` ...) goes along.
    groups = [
        {key: _number(value) for key, value in group.items() if key in names or key not in optimizer.defaults}
        for group in optimizer.param_groups
    ]
    defaults = {name: _number(optimizer.defaults[name]) for name in names}
    ops.build(["cpu_adagrad" if kind == "Adagrad" else "cpu_adam"])
    if kind == "Adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad(groups, **defaults)  # type: ignore[no-any-return]
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=kind == "AdamW", **defaults)  # type: ignore[no-any-return]


def map_pytorch_optim_to_deepspeed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's CPU version of an optimizer, with its hyper-parameters and param groups.

    Raises:
        ConfigError: it has none. (Accelerate gives CPU Adam then, whatever the optimizer was.)
    """
    version = cpu_version(optimizer)
    if version is None:
        raise ConfigError(
            f"DeepSpeed has no CPU version of {type(optimizer).__name__} with these options: use torch.optim's Adam,"
            " AdamW or Adagrad, or keep the optimizer, which PyTorch steps on the CPU then"
        )
    return version


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _same_rule(optimizer: torch.optim.Optimizer) -> str | None:
    kinds = {cls: name for name in ("AdamW", "Adam", "Adagrad") for cls in _classes(name, f"{name}32bit")}
    kind = kinds.get(type(optimizer))
    groups = optimizer.param_groups
    # Variants that the C++ versions do not know.
    variants = ("amsgrad", "maximize", "lr_decay", "initial_accumulator_value", "differentiable")
    if any(group.get(name) for group in groups for name in variants):
        return None
    # One rule for all groups: in PyTorch AdamW is Adam with decoupled_weight_decay in its groups.
    decoupled = {bool(group.get("decoupled_weight_decay", kind == "AdamW")) for group in groups}
    if kind == "Adagrad" or kind is None:
        return kind
    return None if len(decoupled) > 1 else "AdamW" if decoupled.pop() else "Adam"


def _classes(*names: str) -> list[type]:
    import sys

    found = [getattr(torch.optim, name) for name in names if hasattr(torch.optim, name)]
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        found += [getattr(bitsandbytes.optim, name) for name in names if name.endswith("32bit")]
    return found


def for_offload(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], asked: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer that steps under optimizer offload.

    Args:
        optimizer: the user's; its param groups become those of the optimizer that steps.
        config: the resolved DeepSpeed config, in which DeepSpeed's own check is off.
        asked: the config as the user wrote it; `zero_force_ds_cpu_optimizer: false` keeps the user's optimizer.
    """
    device = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    if device in (None, "none"):
        return optimizer
    replacement = cpu_version(optimizer) if asked.get("zero_force_ds_cpu_optimizer", True) else None
    if replacement is not None:
        # Whoever holds the user's optimizer, a scheduler of another library for one, still sets the rates that count.
        optimizer.param_groups = replacement.param_groups
        return replacement
    if not type(optimizer).__module__.startswith("deepspeed."):
        logger.info("%s has no C++ version for optimizer offload: PyTorch's own steps", type(optimizer).__name__)
    return optimizer
