"""Stage 3: all ranks run the same modules in the same order, or are told which of them did not.

DeepSpeed 0.19.8 gathers what each rank asks for: weights of different modules, mixed up, if their sizes agree. It also
gathers ahead, in the order of earlier passes, so that all ranks must run small modules, which are never split, too.

Ranks compare where they can have parted, and nowhere else. What followed upon a module in earlier passes is the same on
all ranks; so where nothing or several things did, all ranks meet, and where one thing did, a rank that goes on with it
goes on alone, and one that does not waits for the others to come to the same decision.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from deepspeed.runtime.compiler import lazy_disable

from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet, meet_apart

_REMEDY = (
    "all ranks gather the weights of each module together, so all have to run the same modules in the same order. Where"
    " each chooses for itself (experts, branches), put the choice into a module of its own and name its class in"
    " transformer_moe_cls_names: its weights are gathered as a whole. Or use ZeRO stage 2, where this is no problem"
)


def watch(engine: Any) -> None:
    """Compares what the ranks run, in every pass through the model.

    Args:
        engine: of stage 3, with or without optimizer.

    Raises (from the model, later):
        DistributedError: ranks are at different modules: on all of them, or on those that left the order of earlier
            passes, once the process group's timeout is almost over, since the others may be held up in DeepSpeed.
    """
    if engine.world_size > 1:
        _Order(engine)


class _Order:
    """Known successors of each place in a pass: its number in the pass, and what is said of it in an error."""

    def __init__(self, engine: Any) -> None:
        self._name = f"the pass through {type(engine.module).__name__} at ZeRO stage 3"
        self._names = {module: name for name, module in engine.module.named_modules()}
        self._known: defaultdict[tuple[int, str], set[str]] = defaultdict(set)
        self._number, self._place = 0, ""
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        coordinator = offload.get_param_coordinator()
        self._fetch, self._reset = coordinator.fetch_sub_module, coordinator.reset_step
        coordinator.fetch_sub_module, coordinator.reset_step = self._follow_and_fetch, self._end_pass

    @lazy_disable  # type: ignore[untyped-decorator]
    def _follow_and_fetch(self, module: torch.nn.Module, forward: bool) -> None:
        name = self._names.get(module, "a module that came later") or "the model"
        self._follow(f"{'forward' if forward else 'backward'} of {name} ({type(module).__name__})")
        self._fetch(module, forward)

    @lazy_disable  # type: ignore[untyped-decorator]
    def _end_pass(self) -> None:
        """DeepSpeed ends a pass where the next one begins."""
        if self._number:
            self._follow("the begin of another pass")
        self._number, self._place = 0, ""
        self._reset()

    def _follow(self, place: str) -> None:
        known = self._known[self._number, self._place]
        if len(known) != 1:
            meet(PartialState(), self._name, place, _REMEDY)
        elif place not in known:
            meet_apart(PartialState(), self._name, place, f"{_REMEDY}. In earlier passes came here {min(known)}")
        known.add(place)
        self._number, self._place = self._number + 1, place
