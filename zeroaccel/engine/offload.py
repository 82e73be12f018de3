"""Optimizers whose state lies in CPU memory or on NVMe: DeepSpeed's C++ version where there is one."""

from __future__ import annotations

from typing import Any

import torch

from zeroaccel.errors import ConfigError
from zeroaccel.logging import library_logger

logger = library_logger(__name__)

# Their rule needs a parameter's shape, or all parameters at once; ZeRO hands them flat partitions.
SHAPE_DEPENDENT = ("Adafactor", "LBFGS", "Muon", "Shampoo", "SOAP")


def refuse_shape_dependent(optimizer: torch.optim.Optimizer, stage: int) -> None:
    """Refuses an optimizer that would silently follow another rule on flat partitions.

    Raises:
        ConfigError: it is one of `SHAPE_DEPENDENT` and the stage partitions its state.
    """
    name = type(optimizer).__name__
    if stage >= 1 and name in SHAPE_DEPENDENT:
        raise ConfigError(
            f"{name} needs whole parameters, but ZeRO stage {stage} hands an optimizer flat slices of them, on which it"
            f" would compute something else: use zero_stage=0, or another optimizer"
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
    groups = [
        {key: value for key, value in group.items() if key in (*names, "params", "initial_lr", "name")}
        for group in optimizer.param_groups
    ]
    defaults = {name: _number(optimizer.defaults[name]) for name in names}
    for group in groups:
        group.update({name: _number(group[name]) for name in names})
    if kind == "Adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad(groups, **defaults)  # type: ignore[no-any-return]
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=kind == "AdamW", **defaults)  # type: ignore[no-any-return]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _same_rule(optimizer: torch.optim.Optimizer) -> str | None:
    kind = next(
        (
            name
            for name, classes in (
                ("AdamW", _classes("AdamW", "AdamW32bit")),
                ("Adam", _classes("Adam", "Adam32bit")),
                ("Adagrad", _classes("Adagrad", "Adagrad32bit")),
            )
            if type(optimizer) in classes
        ),
        None,
    )
    # Variants that the C++ versions do not know.
    variants = ("amsgrad", "maximize", "lr_decay", "initial_accumulator_value", "differentiable")
    if any(group.get(name) for group in [optimizer.defaults, *optimizer.param_groups] for name in variants):
        return None
    decoupled = kind == "Adam" and any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
    return "AdamW" if decoupled else kind


def _classes(*names: str) -> list[type]:
    import sys

    found = [getattr(torch.optim, name) for name in names if hasattr(torch.optim, name)]
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        found += [getattr(bitsandbytes.optim, name) for name in names if name.endswith("32bit")]
    return found


def for_offload(optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that steps under optimizer offload; switches DeepSpeed's own check off where it keeps the rule.

    Args:
        optimizer: the user's.
        config: the resolved DeepSpeed config; changed in place.
    """
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if device == "none":
        return optimizer
    replacement = cpu_version(optimizer) if config.get("zero_force_ds_cpu_optimizer", True) else None
    if replacement is not None:
        return replacement
    config["zero_force_ds_cpu_optimizer"] = False
    if not type(optimizer).__module__.startswith("deepspeed."):
        logger.info(
            "%s has no C++ version for optimizer offload: PyTorch's own steps on the CPU",
            type(optimizer).__name__,
        )
    return optimizer
