"""Stages 2 and 3 reduce gradients during the backward pass: here in one order on all ranks, whatever each of them ran.

DeepSpeed reduces gradients in the order in which this rank's backward pass makes them. Where ranks ran different
modules (an expert, a branch), gradients of different parameters are then added up without an error if their sizes
agree, and ranks die or wait for ever if not. Here a gradient is handed to DeepSpeed when all those before it in a
common order were, and at the end of the pass those that this rank has not got, as zeros. The common order is that of
the first pass, in which ranks tell each other what they have before each bucket; later passes need no such exchange.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from zeroaccel.errors import UnsupportedError


class ReductionOrder:
    """Stands between the hooks of a sharded optimizer and its reduction.

    Args:
        optimizer: DeepSpeed's, of stage 2 or 3.
        module: whose parameters it trains.

    Raises (from the backward pass, later):
        UnsupportedError: a parameter gets a second gradient in one pass.
    """

    def __init__(self, optimizer: Any, module: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._module = module
        self._stage_3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
        groups = optimizer.fp16_groups if self._stage_3 else optimizer.bit16_groups
        # What DeepSpeed's reduction takes beside the parameter: at stage 2 the number of its group.
        self._arguments = {
            parameter: () if self._stage_3 else (number,) for number, group in enumerate(groups) for parameter in group
        }
        self._order: list[torch.nn.Parameter] | None = None  # None in the first pass
        # Ordered sets: of gradients that are there, and of those that were handed over.
        self._ready: dict[torch.nn.Parameter, None] = {}
        self._handed: dict[torch.nn.Parameter, None] = {}
        self._waiting = 0  # elements of gradients that are ready and not handed over, in the first pass
        self._next = 0
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._end = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._gradient_is_ready
        optimizer.independent_gradient_partition_epilogue = self._end_pass

    def forget(self) -> None:
        """A pass failed half way: its gradients are thrown away."""
        self._ready.clear()
        self._handed.clear()
        self._waiting = self._next = 0

    def _gradient_is_ready(self, parameter: torch.nn.Parameter, *arguments: Any) -> None:
        made_in_pieces = not getattr(parameter, "ds_grad_is_ready", True)  # DeepSpeed's tiled modules
        if made_in_pieces or self._optimizer._coalesce_grad_reduction:
            self._reduce(parameter, *arguments)
            return
        if parameter in self._handed:
            self._refuse(parameter)
        if parameter in self._ready:
            return
        self._ready[parameter] = None
        if self._order is not None:
            self._hand_over_next()
            return
        self._waiting += parameter.grad.numel() if parameter.grad is not None else parameter.numel()
        if self._waiting >= self._optimizer.reduce_bucket_size:
            self._agree(ended=False)

    def _refuse(self, parameter: torch.nn.Parameter) -> None:
        name = next(name for name, each in self._module.named_parameters() if each is parameter)
        raise UnsupportedError(
            f"{name} got a second gradient in one backward pass, as weights do that two reentrant checkpoints use, and"
            " those of a class in transformer_moe_cls_names that runs twice; ZeRO stages 2 and 3 reduce one. Use"
            " torch.utils.checkpoint.checkpoint(..., use_reentrant=False), with transformers"
            " gradient_checkpointing_kwargs={'use_reentrant': False}, or ZeRO stage 1"
        )

    def _hand_over_next(self) -> None:
        assert self._order is not None
        while self._next < len(self._order):
            parameter = self._order[self._next]
            if parameter not in self._ready and parameter.requires_grad:
                return
            self._next += 1
            if parameter in self._ready:
                self._hand_over(parameter)

    def _hand_over(self, parameter: torch.nn.Parameter) -> None:
        if parameter not in self._ready:
            self._fill(parameter)
        self._ready.pop(parameter, None)
        self._handed[parameter] = None
        self._reduce(parameter, *self._arguments[parameter])

    def _fill(self, parameter: torch.nn.Parameter) -> None:
        parameter.grad = torch.zeros_like(parameter)
        if self._stage_3:  # where the parameter itself may be empty now, and its gradient is not
            parameter.grad.data = parameter.grad.new_zeros(parameter.ds_shape)  # type: ignore[attr-defined]
        elif self._optimizer.use_grad_accum_attribute:
            self._optimizer._fill_param_grad_accum_attribute(parameter)

    def _agree(self, ended: bool) -> bool:
        """Hands over what each rank has, or will not get any more. Collective.

        Returns:
            Whether all ranks are at the end of their pass.
        """
        numbers = {parameter: number for number, parameter in enumerate(self._arguments)}
        own = [numbers[parameter] for parameter in self._ready]
        told: list[Any] = [None] * dist.get_world_size(self._optimizer.dp_process_group)
        dist.all_gather_object(told, (ended, own), group=self._optimizer.dp_process_group)
        parameters = list(self._arguments)
        for number in dict.fromkeys(chain.from_iterable(has for _, has in told)):
            if all(at_end or number in has for at_end, has in told):
                self._hand_over(parameters[number])
        self._waiting = 0
        return all(at_end for at_end, _ in told)

    def _end_pass(self) -> None:
        if self._order is None:
            while not self._agree(ended=True):
                pass
            self._order = [*self._handed, *(each for each in self._arguments if each not in self._handed)]
        else:
            for parameter in self._order[self._next :]:
                if parameter.requires_grad:
                    self._hand_over(parameter)
        self.forget()
        self._end()
