"""Backward, clip and step of a plain PyTorch optimizer, as `window.py` decides."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from zeroaccel.engine.weights import LossWeights
from zeroaccel.engine.window import Window
from zeroaccel.errors import UsageError
from zeroaccel.state import GradientState

AFTER_CLIPPING = (
    "backward was called after the window's gradients were clipped or read: run all backward passes of an optimizer"
    " step first, then clip_grad_norm_, then optimizer.step()"
)


class PlainStepper:
    """Drives one optimizer without DeepSpeed.

    Attributes:
        window: the optimizer's accumulation window.
        step_was_skipped: whether the scaler gave up the last real step because of an overflow.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        state: GradientState,
        scaler: Any = None,
        weights: LossWeights | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.window = Window(state.num_steps)
        self.step_was_skipped = False
        self._state = state
        self._scaler = scaler
        self._weights = weights or LossWeights(torch.device("cpu"))
        self._corrected = False
        self._unscaled = False

    def _gradients(self) -> Iterator[torch.Tensor]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter.grad

    def begin_backward(self) -> None:
        """A backward pass comes.

        Raises:
            UsageError: the window's gradients are final already.
        """
        if self._corrected:
            raise UsageError(AFTER_CLIPPING)

    def count_backward(self, scaled: bool, weight: float | None = None) -> None:
        """A backward pass ran, of a loss divided by the gradient accumulation steps, or multiplied by `weight`."""
        state = self._state
        self.window.size = state.num_steps
        self.window.backward(state.batches_drawn if state.in_dataloader else None, scaled, weight)
        if not self.window.inside_context and not state.script_cuts:
            state._mirror_sync_gradients(self.window.syncs)

    def prepare_to_change(self) -> bool:
        """Makes the gradients final, for clipping; False inside an open window, where they must not be touched."""
        if not self.window.closes(self._state.script_cuts, self._state.sync_gradients):
            return False
        self.unscale()
        self._correct()
        return True

    def unscale(self) -> None:
        """Divides the gradients by the scaler's factor, once a step."""
        if self._scaler is not None and not self._unscaled:
            self._scaler.unscale_(self.optimizer)
            self._unscaled = True

    def _correct(self) -> None:
        if self._corrected:
            return
        weight = self.window.weight
        factor = self.window.correction if weight is None else self._weights.factor(weight)
        if factor != 1.0:
            for gradient in self._gradients():
                gradient.mul_(factor)
        self._corrected = True

    def step(self) -> None:
        """The update, if this call closes the window; else nothing."""
        state = self._state
        real = self.window.step(state.script_cuts, state.sync_gradients)
        if not self.window.inside_context and not state.script_cuts:
            state._mirror_sync_gradients(real or self.window.micro_batches == 0)
        if not real:
            return
        self._correct()
        if self._scaler is None:
            self.optimizer.step()
        else:
            scale = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.step_was_skipped = self._scaler.get_scale() < scale
        self._close()

    def zero_grad(self) -> None:
        """Throws the accumulated gradients away, unless an accumulation window is open."""
        if self.window.clears:
            self.optimizer.zero_grad()
            self._close()

    def _close(self) -> None:
        self.window.close()
        self._corrected = self._unscaled = False

    def check_stepped(self) -> None:
        """At the end of a loader's epoch.

        Raises:
            UsageError: gradients were accumulated, but `optimizer.step()` was never called.
        """
        if self.window.forgotten:
            raise UsageError(never_stepped(self.window))


def never_stepped(window: Window) -> str:
    """What a loop without `optimizer.step()` is told."""
    return (
        f"{window.micro_batches} batches were backwarded and optimizer.step() was never called, so nothing was"
        " trained: call the step() of the optimizer that prepare() returned, after backward"
    )


def check_at_epoch_end(stepper: Any, state: GradientState) -> None:
    """Has `stepper.check_stepped()` called when a loader ends, as long as the stepper lives."""
    reference = weakref.ref(stepper)

    def hook() -> None:
        if (alive := reference()) is not None:
            alive.check_stepped()

    state._epoch_end_hooks.append(hook)
