"""Stage 3: all ranks run the same modules in the same order, or are told which of them did not."""

from __future__ import annotations

from typing import Any

import torch

from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet

_REMEDY = (
    "all ranks gather the weights of each module together, so all have to run the same modules in the same order. Where"
    " each chooses for itself (experts, branches), put the choice into a module of its own and name its class in"
    " transformer_moe_cls_names: its weights are gathered as a whole. Or use ZeRO stage 2, where this is no problem"
)


def watch_first_passes(engine: Any) -> None:
    """Compares the ranks before each module, in the first pass of training and in that of evaluation.

    DeepSpeed 0.19.8 gathers what each rank asks for: weights of different modules, mixed up, if their sizes agree. It
    also gathers ahead, in the order of earlier passes, so that all ranks must run small modules, which are never split,
    too. Later passes are left to DeepSpeed, which compares ranks at the end of one whose order is new.

    Args:
        engine: of stage 3, with or without optimizer.

    Raises (from the model, later):
        DistributedError: on all ranks, if they are at different modules.
    """
    if engine.world_size > 1:
        _FirstPasses(engine)


class _FirstPasses:
    def __init__(self, engine: Any) -> None:
        self._module: torch.nn.Module = engine.module
        self._names = {module: name for name, module in engine.module.named_modules()}
        self._to_watch = {True, False}  # whether the model is in training
        self._seen: set[bool] = set()
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        self._coordinator = offload.get_param_coordinator()
        self._fetch, self._reset = self._coordinator.fetch_sub_module, self._coordinator.reset_step
        self._coordinator.fetch_sub_module, self._coordinator.reset_step = self._meet_and_fetch, self._end_pass

    def _meet_and_fetch(self, module: torch.nn.Module, forward: bool) -> None:
        training = self._module.training
        if training in self._to_watch:
            self._seen.add(training)
            name = f"the pass through {type(self._module).__name__} at ZeRO stage 3"
            outline = f"{'forward' if forward else 'backward'} of {self._names[module]} ({type(module).__name__})"
            meet(PartialState(), name, outline, _REMEDY)
        self._fetch(module, forward)

    def _end_pass(self) -> None:
        self._reset()
        self._to_watch -= self._seen
        self._seen.clear()
        if not self._to_watch:
            del self._coordinator.fetch_sub_module, self._coordinator.reset_step
