"""The gradients of an accumulation window that is still open, kept for a run that goes on with it.

They lie where DeepSpeed accumulates, which depends on stage, offload, precision and number of ranks, and are kept as
they lie: they fit a run of the same kind only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from zeroaccel.engine.masters import names_of
from zeroaccel.engine.stepping import Stepper
from zeroaccel.errors import UsageError


def layout(stepper: Stepper) -> str:
    """Where the gradients lie: they fit runs whose layout is equal."""
    optimizer = stepper.engine.optimizer
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    return (
        f"ZeRO stage {stepper.engine.zero_optimization_stage()}, {type(optimizer).__name__},"
        f" {'with' if offloaded else 'without'} optimizer offload,"
        f" {str(stepper.engine.get_data_types()[0]).removeprefix('torch.')}"
    )


def kept(stepper: Stepper) -> dict[str, Any]:
    """The open window: its gradients on this rank, and how far it is.

    Raises:
        UsageError: its gradients are final already, so that nothing but the step can follow.
    """
    if stepper._final or stepper._broken:
        raise UsageError(
            "the gradients of this accumulation window were clipped, read or changed, or a backward pass failed: save"
            " before that, or after optimizer.step()"
        )
    get_accelerator().synchronize()  # offloaded gradients are copied to host memory without waiting
    return {
        "gradients": {name: tensor.detach().cpu() for name, tensor in _gradients(stepper).items()},
        "flags": _flags(stepper),
        "window": stepper.window.state_dict(),
        "reduced": stepper._reduced,
        "factor": stepper._factor,
        "share": stepper._share,
        "unit": stepper._weights._unit,
    }


def restore(stepper: Stepper, saved: Mapping[str, Any]) -> None:
    """Goes on with what `kept` gave; the stepper's own window must be empty."""
    with torch.no_grad():
        _set_gradients(stepper, saved["gradients"], saved["flags"])
    stepper.window.load_state_dict(saved["window"])
    stepper._reduced, stepper._factor = saved["reduced"], saved["factor"]
    stepper._share = saved.get("share", 1.0)
    if saved["unit"] is not None:
        stepper._weights._unit = saved["unit"]


def _flags(stepper: Stepper) -> dict[str, Any]:
    optimizer = stepper.engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return {"touched": [list(group) for group in optimizer.fp32_groups_has_gradients]}
    return {"micro_step_id": optimizer.micro_step_id} if hasattr(optimizer, "micro_step_id") else {}


def _gradients(stepper: Stepper) -> dict[str, torch.Tensor]:
    optimizer = stepper.engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        (flat,) = stepper._gradients.accumulated()
        return {"flat": flat}
    if isinstance(optimizer, BF16_Optimizer):
        return {str(number): flat for number, flat in enumerate(optimizer.fp32_groups_gradients_flat)}
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return {name: p.grad for name, p in stepper.engine.module.named_parameters() if p.grad is not None}
    if not optimizer.partition_gradients:
        names = names_of(stepper.engine.module)
        held = {
            names[id(p)]: optimizer.get_param_gradient_attribute(p) for group in optimizer.bit16_groups for p in group
        }
        return {name: gradient for name, gradient in held.items() if gradient is not None}
    if optimizer.cpu_offload:
        return {str(number): gradient for number, gradient in optimizer.accumulated_grads_in_cpu.items()}
    return _partitioned(optimizer)


def _partitioned(optimizer: Any) -> dict[str, torch.Tensor]:
    """Stage 2 without offload: one flat tensor a group, or a list of tensors."""
    found = {}
    for group in range(len(optimizer.bit16_groups)):
        flat = getattr(optimizer.averaged_gradients.get(group), "flat_partition", None)
        if flat is not None:
            found[f"{group}"] = flat
        for number, tensor in enumerate(optimizer.all_grad_tensors.get(group) or ()):
            found[f"{group}.{number}"] = tensor
    return found


def _set_gradients(stepper: Stepper, saved: Mapping[str, torch.Tensor], flags: Mapping[str, Any]) -> None:
    optimizer, device = stepper.engine.optimizer, stepper.engine.device
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.clear_backward_seen_flag()  # else the next forward pass takes what is restored for an old window's
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        (flat,) = stepper._gradients.accumulated()
        flat.copy_(saved["flat"])
    elif isinstance(optimizer, BF16_Optimizer):
        for flat, gradient in zip(optimizer.fp32_groups_gradients_flat, saved.values(), strict=True):
            flat.copy_(gradient)
        optimizer.fp32_groups_has_gradients[:] = [list(group) for group in flags["touched"]]
    elif not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.partition_gradients:
        zero = isinstance(optimizer, DeepSpeedZeroOptimizer)
        for name, parameter in stepper.engine.module.named_parameters():
            if name in saved:
                setattr(parameter, "grad_accum" if zero else "grad", saved[name].to(device))
    elif optimizer.cpu_offload:
        for number, gradient in saved.items():
            own = gradient.clone()
            pinned = get_accelerator().pin_memory(own) if optimizer.cpu_offload_pin_memory else own
            optimizer.accumulated_grads_in_cpu[int(number)] = pinned
            optimizer._offload_accumulated_param_ids.add(int(number))
    else:
        _set_partitioned(optimizer, saved, device)
    if "micro_step_id" in flags:
        optimizer.micro_step_id = flags["micro_step_id"]


def _set_partitioned(optimizer: Any, saved: Mapping[str, torch.Tensor], device: torch.device) -> None:
    for name, gradient in saved.items():
        group, dot, _ = name.partition(".")
        if not dot:
            optimizer.averaged_gradients[int(group)] = optimizer._build_compact_grad_partition_buffer(int(group))
            optimizer.averaged_gradients[int(group)].flat_partition.copy_(gradient)
            continue
        tensors = optimizer.all_grad_tensors.get(int(group)) or []
        optimizer.all_grad_tensors[int(group)] = [*tensors, gradient.to(device)]
