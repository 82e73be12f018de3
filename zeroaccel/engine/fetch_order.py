"""Stage 3: all ranks run the same modules in the same order, or are told which of them did not.

DeepSpeed 0.19.8 gathers what each rank asks for: weights of different modules, mixed up, if their sizes agree. It also
gathers ahead, in the order of earlier passes, so that all ranks must run small modules, which stay gathered, too.

Ranks compare where they can have parted, and nowhere else. What followed a module in earlier passes is the same on all
ranks; so where nothing or several things did, all ranks meet, and where one thing did, a rank that goes on with it goes
on alone, and one that does not waits for the others to come to the same decision.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter, defaultdict
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


_END = "the beginning of another pass"
_TOLD_APART = 64  # visits of a module in a pass; those that follow count as one, or a loop within a pass had no end
_numbers = itertools.count(1)  # of engines, which all ranks make in one order


def watch(engine: Any) -> None:
    """Compares what the ranks run, in every pass through the model.

    Args:
        engine: of stage 3, with or without optimizer.

    Raises (from the model, later):
        DistributedError: ranks are at different modules: on all ranks, or on those that left the order of earlier
            passes, once the process group's timeout is almost over, since the others may be held up in DeepSpeed.
    """
    if engine.world_size > 1:
        _Order(engine)


class _Order:
    """What has followed each place in a pass: a module's forward or backward, and which of its visits this is."""

    def __init__(self, engine: Any) -> None:
        self._name = f"the pass through {type(engine.module).__name__} (engine {next(_numbers)}) at ZeRO stage 3"
        self._names = {module: name or "the model" for name, module in engine.module.named_modules()}
        self._place_of = functools.cache(self._in_words)
        self._known: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        self._visits: Counter[str] = Counter()
        self._place = _END
        self._over = False
        self._lock = threading.Lock()  # DeepSpeed may come to one module on several threads of a backward pass
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        self._coordinator = offload.get_param_coordinator()
        self._fetch, self._reset = self._coordinator.fetch_sub_module, self._coordinator.reset_step
        self._coordinator.fetch_sub_module, self._coordinator.reset_step = self._follow_and_fetch, self._end_pass

    def _follow_and_fetch(self, module: torch.nn.Module, forward: bool) -> None:
        with self._lock:
            self._leave_pass()
            self._follow(self._place_of(module, forward))
        self._fetch(module, forward)

    def _in_words(self, module: torch.nn.Module, forward: bool) -> str:
        name = self._names.get(module) or f"a module that came later, number {module.ds_id}"
        return f"{'forward' if forward else 'backward'} of {name} ({type(module).__name__})"

    @lazy_disable  # type: ignore[untyped-decorator]  # as DeepSpeed's; what calls the others is disabled as a whole
    def _end_pass(self) -> None:
        """DeepSpeed ends a pass where the next one begins."""
        self._over = self._place != _END
        if not self._coordinator.is_complete_trace():  # DeepSpeed compares ranks, so all are here
            self._leave_pass()
        self._reset()

    def _leave_pass(self) -> None:
        """Not before the next module: a rank may run the model by itself while everything is gathered."""
        if self._over:
            self._over = False
            self._follow(_END)
            self._visits.clear()

    def _follow(self, place: str) -> None:
        known = self._known[self._place, min(self._visits[self._place], _TOLD_APART)]
        if len(known) != 1:
            meet(PartialState(), self._name, place, _REMEDY)
        elif place not in known:
            meet_apart(PartialState(), self._name, place, f"{_REMEDY}. In earlier passes {min(known)} came next")
        known.add(place)
        self._place = place
        self._visits[place] += 1
