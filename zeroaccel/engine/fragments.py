"""A parameter's gradient, wherever DeepSpeed keeps its pieces, through DeepSpeed's own functions.

`deepspeed.utils.safe_get_full_grad` and its siblings end in methods of the parameter (stages 1 and 2) or of the
optimizer (stage 3). Here these methods get three manners that they lack: the gradient is that of the whole window,
averaged over the ranks; it is the true one, without fp16's loss scale; and what is written counts in the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class GradientHolder(Protocol):
    """Who knows where the window's gradients stand."""

    @property
    def loss_scale(self) -> float:
        """Factor between kept and true gradients."""
        ...

    def complete(self) -> None:
        """Makes the window's gradients final, or raises."""
        ...

    def edited(self) -> None:
        """They were changed."""
        ...


def give_access(optimizer: Any, holder: GradientHolder) -> None:
    """Has DeepSpeed's access functions ask `holder`. At stage 0 they read `parameter.grad`, which is final early."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _give_access_to_shards(optimizer, holder)
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        groups = optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
        for group in groups:
            for parameter in group:
                _give_access_to_fragment(parameter, holder)


def _give_access_to_fragment(parameter: Any, holder: GradientHolder) -> None:
    read, write = parameter.get_full_hp_grad, parameter.set_full_hp_grad

    def get() -> torch.Tensor:
        holder.complete()
        gradient: torch.Tensor = read()
        return gradient / holder.loss_scale

    def put(value: torch.Tensor) -> None:
        holder.complete()
        write(value * holder.loss_scale)
        holder.edited()

    parameter.get_full_hp_grad, parameter.set_full_hp_grad = get, put


def _give_access_to_shards(optimizer: Any, holder: GradientHolder) -> None:
    def unscaled(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get(param: Any) -> Any:
            holder.complete()
            gradient = read(param)
            return None if gradient is None else gradient / holder.loss_scale

        return get

    def own_place(param: Any) -> slice:
        """What this rank has of the flattened parameter; padding behind its end would count in the norm."""
        size = param.partition_numel()
        begin = min(size * optimizer._get_param_partition_rank(param), param.ds_numel)
        return slice(begin, min(begin + size, param.ds_numel))

    def put_shard(value: torch.Tensor, param: Any) -> None:
        if not param.requires_grad:
            return
        holder.complete()
        kept, group = optimizer._get_fp32_grad_state_partition(param=param, release_swap_buffers=False)
        place = own_place(param)
        shard = value.flatten()[: place.stop - place.start].to(kept.device) * holder.loss_scale
        kept.narrow(0, 0, shard.numel()).copy_(shard)
        if optimizer._swappable_optimizer_subgroup(group):
            optimizer.norm_for_param_grads[optimizer.get_param_id(param)] = kept.double().norm(2)
            optimizer._writeback_swap_state(group, write_opt_state=False, write_gradients=True)
        holder.edited()

    def put(value: torch.Tensor, param: Any) -> None:
        # Not DeepSpeed's own: that one fails where the ranks do not divide the parameter.
        put_shard(value.flatten()[own_place(param)], param)

    def update(update_func: Callable[[torch.Tensor, Any], torch.Tensor], param_list: list[Any]) -> None:
        for param in param_list:
            if param.requires_grad:
                put(update_func(optimizer.get_fp32_grad_for_param(param), param), param)

    optimizer.get_fp32_grad_for_param = unscaled(optimizer.get_fp32_grad_for_param)
    optimizer.get_local_fp32_grad_for_param = unscaled(optimizer.get_local_fp32_grad_for_param)
    optimizer.set_fp32_grad_for_param = put
    optimizer.set_local_grad_for_param = put_shard
    optimizer.update_fp32_grad_for_param_vectorized = update
