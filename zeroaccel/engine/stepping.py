"""Backward, clip and step on DeepSpeed's engines, as `window.py` decides and `gradients.py` can.

DeepSpeed ties the reduction of gradients to the backward pass and the update to its own count of micro-steps. Here a
backward pass only accumulates; the first of `clip_grad_norm_`, `clip_grad_value_` and `step` closes the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from zeroaccel.engine.gradients import gradients_of
from zeroaccel.engine.plain_stepping import AFTER_CLIPPING, check_at_epoch_end, never_stepped
from zeroaccel.engine.window import Window
from zeroaccel.errors import UnsupportedError, UsageError
from zeroaccel.state import GradientState

_GRAPHS = deepspeed_engine._ENGINE_BACKWARD_GRAPH_TRACKER


class Stepper:
    """Drives one engine that has an optimizer.

    Attributes:
        window: the engine's accumulation window.
        step_was_skipped: whether the last real step was given up, because of an fp16 overflow.
        configured_clipping: what clips where the script does not, 0 for nothing.
        trained: ids of the parameters that the optimizer trains.
    """

    def __init__(self, engine: DeepSpeedEngine, trained: set[int], state: GradientState) -> None:
        self.engine = engine
        self.window = Window(state.num_steps)
        self.step_was_skipped = False
        self.configured_clipping = float(engine.gradient_clipping() or 0.0)
        self.trained = trained
        self._last_norm = torch.zeros((), device=engine.device)
        self._state = state
        self._gradients = gradients_of(engine)
        self._reduced = False
        self._native = False
        self._reached = False
        self._graph_kept = False
        self._hook_engine()
        self._gradients.after_step()
        check_at_epoch_end(self, state)

    # --- the engine's own methods -------------------------------------------------------------------------------

    def _hook_engine(self) -> None:
        """Native `engine.backward`/`engine.step` keep DeepSpeed's meaning; `loss.backward()` is counted too."""
        engine, own_prologue = self.engine, self.engine._backward_prologue

        def native_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._enter_native()
            return DeepSpeedEngine.backward(engine, loss, *args, **kwargs)

        def native_step(*args: Any, **kwargs: Any) -> Any:
            self._enter_native()
            return DeepSpeedEngine.step(engine, *args, **kwargs)

        def zero_grad(set_to_none: bool = True) -> None:
            if engine._running_engine_step:
                DeepSpeedEngine.zero_grad(engine)
            else:
                self.zero_grad()

        def prologue() -> None:
            self._reached = True
            if not engine._running_engine_backward:
                self._enter_torch_backward()
            own_prologue()

        engine.backward, engine.step = native_backward, native_step
        engine.zero_grad, engine._backward_prologue = zero_grad, prologue

    def _enter_native(self) -> None:
        if self.window.micro_batches:
            raise UsageError(
                "model.backward()/model.step() and accelerator.backward()/optimizer.step() are mixed in one"
                " accumulation window: use the one pair or the other"
            )
        self._native = True

    def _enter_torch_backward(self) -> None:
        if self._native:
            return
        if self.engine.zero_optimization_stage() == 0:  # DeepSpeed has no hooks there
            raise UsageError("at ZeRO stage 0 call accelerator.backward(loss) instead of loss.backward()")
        if self._gradients.loss_scale != 1.0:
            raise UsageError("fp16 needs its loss scaled: call accelerator.backward(loss) instead of loss.backward()")
        self._begin_backward()
        # DeepSpeed divides the gradient of such a pass by the steps that it was configured with.
        self._count_backward(scaled=self.engine.gradient_accumulation_steps() == self.window.size)

    # --- backward -----------------------------------------------------------------------------------------------

    def _begin_backward(self) -> None:
        if self._native:
            raise UsageError(
                "this model is stepped natively (model.backward, model.step): accelerator.backward and"
                " optimizer.step cannot join in"
            )
        if self._reduced:
            raise UsageError(AFTER_CLIPPING)
        self._reached = False
        self._gradients.arm()

    def _count_backward(self, scaled: bool) -> None:
        state = self._state
        self.window.size = state.num_steps
        self.window.backward(state.batches_drawn if state.in_dataloader else None, scaled)
        if not self.window.inside_context and not state.script_cuts:
            state._mirror_sync_gradients(self.window.syncs)

    # --- closing the window -------------------------------------------------------------------------------------

    def _closes(self) -> bool:
        return self.window.closes(self._state.script_cuts, self._state.sync_gradients)

    def _reduce(self) -> None:
        """Ends the accumulation: corrects a short window, averages over the ranks. Once a window."""
        if self._reduced:
            return
        if (factor := self.window.correction) != 1.0:
            for gradient in self._gradients.accumulated():
                gradient.mul_(factor)
        self._gradients.reduce()
        self._reduced = True

    def norm(self) -> torch.Tensor:
        """True norm of this window's gradients before clipping; inside an open window, the last one's."""
        if self._closes():
            self._reduce()
            scaled = self._gradients.scaled_norm()
            self._gradients.hold_norm(scaled)
            self._last_norm = (scaled.float() / self._gradients.loss_scale).to(self.engine.device)
        return self._last_norm

    def clip_norm(self, max_norm: float) -> None:
        """Clips this window's step to `max_norm`, 0 is off; inside an open window does nothing. Call `norm` first."""
        if self._reduced:
            self._gradients.set_clipping(max_norm)

    def clip_value(self, clip_value: float) -> None:
        """Clamps every element of this window's gradients to [-clip_value, clip_value]."""
        if not self._closes():
            return
        self._reduce()
        bound = float(clip_value) * self._gradients.loss_scale
        for gradient in self._gradients.reduced():
            gradient.clamp_(-bound, bound)
        self._gradients.refresh_norms()

    def step(self) -> None:
        """The update, if this call closes the window; else nothing."""
        if self._native:
            raise UsageError("optimizer.step() on a model that is stepped natively: call model.step() alone")
        real = self.window.step(self._state.script_cuts, self._state.sync_gradients)
        if not self.window.inside_context and not self._state.script_cuts:
            self._state._mirror_sync_gradients(real or self.window.micro_batches == 0)
        if not real:
            return
        self._reduce()
        DeepSpeedEngine.step(self.engine)
        self.step_was_skipped = not self.engine.was_step_applied()
        self._gradients.after_step()
        self._gradients.set_clipping(self.configured_clipping)
        self._reduced = False
        self.window.close()

    def zero_grad(self) -> None:
        """Throws the accumulated gradients away, unless an accumulation window is open."""
        if self._native or not self.window.clears or self.window.micro_batches == 0:
            return
        self._gradients.clear()
        self._gradients.after_step()
        self._gradients.set_clipping(self.configured_clipping)
        self._reduced = False
        self.window.close()

    def check_stepped(self) -> None:
        """At the end of a loader's epoch.

        Raises:
            UsageError: gradients were accumulated, but `optimizer.step()` was never called.
        """
        if self.window.forgotten and not self._native:
            raise UsageError(never_stepped(self.window))


def backward(
    steppers: Sequence[Stepper], loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
) -> None:
    """One backward pass that serves every engine that took part in the loss.

    Args:
        steppers: all engines that have an optimizer.
        loss: scalar with a graph.
        retain_graph: keep the graph for another backward pass.
        scale_wrt_gas: divide by the gradient accumulation steps.
    """
    for stepper in steppers:
        stepper._begin_backward()
    if scale_wrt_gas:
        loss = loss / steppers[0]._state.num_steps
    try:
        reached = _backward_through(steppers, loss, retain_graph)
    except RuntimeError as error:
        if any(stepper._graph_kept for stepper in steppers):
            raise UnsupportedError(
                "a second backward pass through a graph that was kept (retain_graph=True) does not work at ZeRO stage"
                " 3, which lets go of the weights after the first: add the losses and call backward once"
            ) from error
        raise
    for stepper in steppers:
        stepper._graph_kept = retain_graph and stepper.engine.zero_optimization_stage() == 3
    for stepper in reached:
        stepper._count_backward(scaled=scale_wrt_gas)


def _backward_through(steppers: Sequence[Stepper], loss: torch.Tensor, retain_graph: bool) -> Sequence[Stepper]:
    """Runs the pass; returns the engines that took part."""
    if len(steppers) > 1:
        return _backward_several(steppers, loss, retain_graph)
    _backward_one(steppers[0], loss, retain_graph)
    return steppers


def _backward_one(stepper: Stepper, loss: torch.Tensor, retain_graph: bool) -> None:
    # engine.backward scales the loss for ZeRO optimizers only; the fp16 optimizer of stage 0 divides all the same.
    if not isinstance(stepper.engine.optimizer, ZeROOptimizer) and stepper._gradients.loss_scale != 1.0:
        loss = loss.float() * stepper._gradients.loss_scale
    DeepSpeedEngine.backward(stepper.engine, loss, retain_graph=retain_graph, scale_wrt_gas=False)


def _backward_several(steppers: Sequence[Stepper], loss: torch.Tensor, retain_graph: bool) -> list[Stepper]:
    scales = {stepper._gradients.loss_scale for stepper in steppers}
    if len(scales) > 1:
        raise UnsupportedError(
            f"one backward pass through models with different fp16 loss scales ({sorted(scales)}): use bf16,"
            " or give the fp16 models one static loss_scale"
        )
    if (scale := scales.pop()) != 1.0:
        loss = loss.float() * scale
    engines = [stepper.engine for stepper in steppers]
    state = _GRAPHS.new_state()
    hook = loss.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: _GRAPHS.register_current_graph(gradient, state)
    )
    for engine in engines:
        engine._running_engine_backward = True
    try:
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        reached = [stepper for stepper in steppers if stepper._reached]
        for stepper in reached:
            stepper.engine._backward_epilogue()
        return reached
    finally:
        hook.remove()
        _GRAPHS.unregister(state)
        for engine in engines:
            engine._running_engine_backward = False
            if isinstance(engine.optimizer, ZeROOptimizer):
                engine.optimizer._backward_active_depth = 0
