"""The learning-rate schedulers that users hold: `DummyScheduler` before `prepare()`, the wrappers after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zeroaccel.state import AcceleratorState, GradientState


class DummyScheduler:
    """Stands for the scheduler that the DeepSpeed config describes; its values fill the config's `auto` fields.

    Args:
        optimizer: a `DummyOptim` or a real optimizer; its learning rate becomes the peak.
        total_num_steps: length in steps of one process, as for a PyTorch scheduler.
        warmup_num_steps: steps of warm-up, counted likewise.
        lr_scheduler_callable: makes the scheduler from the optimizer, instead of the config.
        kwargs: further values for the config's `scheduler.params`.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[torch.optim.Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs


class AcceleratedScheduler:
    """A prepared PyTorch scheduler: it steps when its optimizers did.

    With `step_with_optimizer` it steps once a process at each real optimizer step, because scripts compute its length
    for one process; with `split_batches` once.

    Args:
        scheduler: the scheduler inside.
        optimizers: the prepared optimizer, or several.
        step_with_optimizer: False steps the scheduler at every call.
        split_batches: whether the loader's batch size is that of all processes together.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: Sequence[Any] = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
        self.step_with_optimizer = step_with_optimizer
        self.split_batches = split_batches
        self.gradient_state = GradientState()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the scheduler, if the optimizers stepped."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(1 if self.split_batches else AcceleratorState().num_processes):
            if self._has_ended():
                return
            self.scheduler.step(*args, **kwargs)

    def _has_ended(self) -> bool:
        # OneCycleLR raises beyond its last step, which rounding up to whole batches reaches.
        total = getattr(self.scheduler, "total_steps", None)
        return not self.split_batches and total is not None and self.scheduler._step_count > total

    def get_last_lr(self) -> Any:
        """Learning rates after the last step, one a param group."""
        return self.scheduler.get_last_lr()

    def get_lr(self) -> Any:
        """Learning rates that the scheduler computes now."""
        return self.scheduler.get_lr()

    def state_dict(self) -> Any:
        """State of the scheduler inside."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads what `state_dict` gave."""
        self.scheduler.load_state_dict(state_dict)

    def print_lr(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own `print_lr`, where it has one."""
        return self.scheduler.print_lr(*args, **kwargs)


class DeepSpeedSchedulerWrapper(AcceleratedScheduler):
    """One of DeepSpeed's schedulers, or one made by `lr_scheduler_callable`: the engine steps it once a real step."""

    def __init__(self, scheduler: Any, optimizers: Any) -> None:
        super().__init__(scheduler, optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the engine's step did it."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads what `state_dict` gave; the optimizer's param groups must have their learning rates already."""
        super().load_state_dict(state_dict)
        if "_last_lr" not in state_dict:  # DeepSpeed's own keep it to themselves, and would show that of a new run
            self.scheduler._last_lr = [group["lr"] for group in self.scheduler.optimizer.param_groups]


def redirect(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Has a PyTorch scheduler, and those that it consists of, drive `optimizer` from now on."""
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        redirect(inner, optimizer)
    scheduler.optimizer = optimizer
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    own_step = optimizer.step

    @functools.wraps(own_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        # By these two names PyTorch notices a scheduler that steps before its optimizer, and warns.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return own_step(*args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]
