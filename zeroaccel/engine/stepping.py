"""Backward, clip and step on DeepSpeed's engines, as `window.py` decides and `gradients.py` can.

DeepSpeed ties the reduction of gradients to the backward pass and the update to its own count of micro-steps. Here a
backward pass only accumulates; the first of `clip_grad_norm_`, `clip_grad_value_` and `step` closes the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from zeroaccel.engine.fragments import give_access
from zeroaccel.engine.gradients import gradients_of
from zeroaccel.engine.inference import let_go_after_backward
from zeroaccel.engine.plain_stepping import AFTER_CLIPPING, check_at_epoch_end, never_stepped
from zeroaccel.engine.weights import LossWeights
from zeroaccel.engine.window import Window
from zeroaccel.errors import UsageError
from zeroaccel.logging import library_logger
from zeroaccel.state import GradientState

logger = library_logger(__name__)

_GRAPHS = deepspeed_engine._ENGINE_BACKWARD_GRAPH_TRACKER
_REQUIRES_GRAD = attrgetter("requires_grad")
_BROKEN = (
    "the last backward pass failed half way, so the gradients are those of a part of the model: call"
    " optimizer.zero_grad() before you go on"
)


class Stepper:
    """Drives one engine that has an optimizer.

    Attributes:
        window: the engine's accumulation window.
        step_was_skipped: whether the last real step was given up, because of an fp16 overflow.
        configured_clipping: what clips where the script does not, 0 for nothing.
        trained: ids of the parameters that the optimizer trains.
    """

    def __init__(self, engine: DeepSpeedEngine, trained: set[int], state: GradientState, weights: LossWeights) -> None:
        self.engine = engine
        self.window = Window(self.steps)
        self.step_was_skipped = False
        self.configured_clipping = float(engine.gradient_clipping() or 0.0)
        self.trained = trained
        self._parameters = [p for p in engine.module.parameters() if id(p) in trained]
        self._last_norm = torch.zeros((), device=engine.device)
        self._state = state
        self._gradients = gradients_of(engine)
        self._weights = weights
        self._begin_window()
        self._native = False
        self._native_step_due = False
        self._admitted = self._reached = False
        self._weighted = False
        self._share_of_pass, self._foreign_of_pass = 1.0, False
        self._hook_engine()
        self._gradients.after_step()
        give_access(engine.optimizer, self)
        check_at_epoch_end(self, state)

    def _begin_window(self) -> None:
        self._reduced = False  # the gradients are averaged over the ranks
        self._factor = 1.0  # what they were multiplied with then
        self._share = 1.0  # what they lack, as another model decided the loss's factor
        self._foreign_scale = False  # which was its fp16 loss scale
        self._final = False  # they were clipped, read or changed: no backward pass may follow
        self._broken = False  # a backward pass into them failed
        self._edited = False  # DeepSpeed's stored norms are old
        self._clipping: float | None = None  # what the script clips this window to, if the step is to do it
        self._clips_as_configured = True
        self.window.close()

    # --- the engine's own methods -------------------------------------------------------------------------------

    def _hook_engine(self) -> None:
        """Native `engine.backward`/`engine.step` keep DeepSpeed's meaning; `loss.backward()` is counted too."""
        engine = self.engine
        own_prologue, own_reach = engine._backward_prologue, engine._backward_prologue_per_tensor

        def native_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._enter_native()
            result = DeepSpeedEngine.backward(engine, loss * 0 if self._state.filler else loss, *args, **kwargs)
            self._native_step_due = engine.is_gradient_accumulation_boundary()
            return result

        def native_step(*args: Any, **kwargs: Any) -> Any:
            self._enter_native()
            DeepSpeedEngine.step(engine, *args, **kwargs)
            if self._native_step_due:
                self.step_was_skipped = not engine.was_step_applied()
            self._native_step_due = False

        def zero_grad(set_to_none: bool = True) -> None:
            if engine._running_engine_step:
                DeepSpeedEngine.zero_grad(engine)
            else:
                self.zero_grad()

        def prologue() -> None:  # at the first gradient of a forward pass's outputs
            if not engine._running_engine_backward:
                self._enter_torch_backward()
            own_prologue()

        def reach(gradient: Any) -> Any:  # at each gradient of an output, also in a second pass through a kept graph
            if not self._reached and self._wants_gradients():
                self._reached = True
                if not self._admitted and not self._native and engine._running_engine_backward:
                    self._admit()
            elif not self._reached and engine.zero_optimization_stage() == 3:
                let_go_after_backward(engine.optimizer.parameter_offload)
            if not engine._running_engine_backward and gradient is not None and self._state.filler:
                gradient = gradient * 0
            return own_reach(gradient)

        engine.backward, engine.step = native_backward, native_step
        engine.zero_grad, engine._backward_prologue = zero_grad, prologue
        engine._backward_prologue_per_tensor = reach

    @property
    def steps(self) -> int:
        """Gradient accumulation steps."""
        return int(self.engine.gradient_accumulation_steps())

    def _wants_gradients(self) -> bool:
        """Whether a pass through the model is more than that: a script may freeze one while it trains another."""
        return any(map(_REQUIRES_GRAD, self._parameters))

    def _enter_native(self) -> None:
        if self._broken:
            raise UsageError(_BROKEN)
        if self.window.micro_batches:
            raise UsageError(
                "model.backward()/model.step() and accelerator.backward()/optimizer.step() are mixed in one"
                " accumulation window: use the one pair or the other"
            )
        if not self._native:
            self._native = True
            self._gradients.let_go()
            if self.window.steps_called:  # DeepSpeed counted our windows as micro-batches: its own begins anew
                self.engine.micro_steps += -self.engine.micro_steps % self.steps

    def _enter_torch_backward(self) -> None:
        if self._native:
            return
        if self.engine.zero_optimization_stage() == 0:  # DeepSpeed has no hooks there
            raise UsageError("at ZeRO stage 0 call accelerator.backward(loss) instead of loss.backward()")
        if self._gradients.loss_scale != 1.0:
            raise UsageError("fp16 needs its loss scaled: call accelerator.backward(loss) instead of loss.backward()")
        self._begin_backward()
        try:
            self._admit()
        except UsageError:
            self._pass_by()
            raise
        self._count_backward(scaled=True)  # DeepSpeed divides the gradient of such a pass

    # --- backward -----------------------------------------------------------------------------------------------

    def _begin_backward(self, weighted: bool = False, share: float = 1.0, foreign_scale: bool = False) -> None:
        """A backward pass comes; whether it reaches this engine is not known yet.

        Args:
            weighted: its loss is multiplied by a weight.
            share: what this engine's gradients lack then, compared with those of a loss of its own.
            foreign_scale: its loss is multiplied by another engine's fp16 loss scale.
        """
        if self._native:
            raise UsageError(
                "this model is stepped natively (model.backward, model.step): accelerator.backward and"
                " optimizer.step cannot join in"
            )
        self.window.size = self.steps
        self._admitted = self._reached = False
        self._weighted = weighted
        self._share_of_pass, self._foreign_of_pass = share, foreign_scale
        if not self._final:
            self._gradients.arm()

    def _pass_by(self) -> None:
        """The pass is over, or was refused, and did not reach this engine."""
        if not self._native and not self._final:
            self._gradients.disarm()

    def _admit(self) -> None:
        """The pass reaches this engine."""
        self._admitted = True
        if self._broken:
            raise UsageError(_BROKEN)
        if self._final:
            raise UsageError(AFTER_CLIPPING)
        self.window.check_weight(self._weighted)
        if self._reduced:  # at stage 0
            self._multiply(1.0 / self._factor)
            self._reduced = False
        if self._share != self._share_of_pass:
            if self.window.micro_batches:
                self._multiply(self._share / self._share_of_pass)
            self._share = self._share_of_pass
        self._foreign_scale |= self._foreign_of_pass

    def _count_backward(self, scaled: bool, weight: float | None = None) -> None:
        state, window = self._state, self.window
        window.backward(state.batches_drawn if state.in_dataloader else None, scaled, weight)
        if not window.inside_context and not state.script_cuts:
            state._mirror_sync_gradients(window.syncs)
        if self._gradients.local and self._would_close():
            self._reduce()

    # --- closing the window -------------------------------------------------------------------------------------

    def _closes(self) -> bool:
        return self.window.closes(self._state.script_cuts, self._state.sync_gradients)

    def _would_close(self) -> bool:
        return self.window.would_close(self._state.script_cuts, self._state.sync_gradients)

    def _reduce(self) -> None:
        """Ends the accumulation: corrects a short or weighted window, averages over the ranks. Once a window."""
        if self._reduced:
            return
        weight = self.window.weight
        self._factor = self.window.correction if weight is None else self._weights.factor(weight)
        self._factor *= self._share
        self._multiply(self._factor)
        self._gradients.reduce()
        self._reduced = True

    def _multiply(self, factor: float) -> None:
        if factor != 1.0:
            for gradient in self._gradients.accumulated():
                gradient.mul_(factor)

    def _refresh_norms(self) -> None:
        self._gradients.refresh_norms()
        self._edited = False

    def norm(self) -> torch.Tensor:
        """True norm of this window's gradients before clipping; inside an open window, the last one's."""
        if self._native and (norm := self.engine.get_global_grad_norm()) is not None:
            return torch.as_tensor(norm, device=self.engine.device)
        if self._closes():
            self.complete()
            if self._edited:
                self._refresh_norms()
            scaled = self._gradients.scaled_norm()
            self._gradients.hold_norm(scaled)
            self._last_norm = (scaled.float() / self.loss_scale).to(self.engine.device)
        return self._last_norm

    def clip_norm(self, max_norm: float) -> None:
        """Clips this window's step to `max_norm`, 0 is off; inside an open window does nothing. Call `norm` first."""
        if not self._final:
            return
        self._gradients.set_clipping(max_norm)
        self._clips_as_configured = False
        self._clipping = max_norm or None
        if self._gradients.local:
            self._clip_now()

    def _clip_now(self) -> None:
        """Scales the gradients, which the step would do else, so that they can be seen as they are stepped on."""
        if self._clipping is None:
            return
        factor = float((self._clipping / (self._last_norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
        if factor != 1.0:
            for gradient in self._gradients.reduced():
                gradient.mul_(factor)
            self.edited()
        self._gradients.set_clipping(0.0)
        self._clipping = None

    def clip_value(self, clip_value: float) -> None:
        """Clamps every element of this window's gradients to [-clip_value, clip_value]."""
        if not self._closes():
            return
        self.complete()
        bound = float(clip_value) * self.loss_scale
        for gradient in self._gradients.reduced():
            gradient.clamp_(-bound, bound)
        self.edited()

    # --- reading and changing gradients, see fragments.py -------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """Factor between the gradients that DeepSpeed keeps and the true ones (fp16), else 1."""
        return self._gradients.loss_scale

    def complete(self) -> None:
        """Makes this window's gradients final: averaged over the ranks, clipped if they were to be. Collective.

        Raises:
            UsageError: the window is still open, or nothing was backwarded.
        """
        if self._native:
            return
        if not self._would_close():
            raise UsageError(
                f"gradients are complete once their accumulation window is: {self.window.micro_batches} of"
                f" {self.window.size} micro-batches were backwarded so far. Read them before optimizer.step(), where"
                " accelerator.sync_gradients is True"
            )
        self._reduce()
        self._final = True
        self._clip_now()

    def edited(self) -> None:
        """This window's gradients were changed: norms are computed anew."""
        self._edited = True
        self._gradients.release_norm()

    def step(self) -> None:
        """The update, if this call closes the window; else nothing."""
        if self._native:
            if self._native_step_due:
                raise UsageError("optimizer.step() on a model that is stepped natively: call model.step() instead")
            return  # as scripts for Accelerate call it after deepspeed_engine_wrapped.backward(), which has stepped
        if self._broken:
            raise UsageError(_BROKEN)
        state, window = self._state, self.window
        real = window.step(state.script_cuts, state.sync_gradients)
        if not window.inside_context and not state.script_cuts:
            state._mirror_sync_gradients(real or window.micro_batches == 0)
        if not real:
            return
        self._reduce()
        if self._gradients.local and self.configured_clipping and self._clips_as_configured:
            self.norm()  # DeepSpeed's own clipping fails there on a parameter without dimensions
            self.clip_norm(self.configured_clipping)
        if self._foreign_scale and not torch.isfinite(self.norm()):
            self.step_was_skipped = True  # an overflow of the other model's, which skips as well
            self._gradients.clear()
            self._end_window()
            return
        if self._edited:
            self._refresh_norms()
        self._gradients.set_boundary(True)  # a pass that did not come here may have taken it away
        DeepSpeedEngine.step(self.engine)
        self.step_was_skipped = not self.engine.was_step_applied()
        if self.step_was_skipped and not self.engine.dynamic_loss_scale():
            logger.warning("a gradient was not finite: the optimizer step was skipped, on all ranks")
        self._end_window()

    def zero_grad(self) -> None:
        """Throws the accumulated gradients away, unless an accumulation window is open."""
        in_use = self._broken or (self.window.micro_batches > 0 and self.window.clears)
        if self._native or not in_use:
            return
        self._gradients.clear()
        self._end_window()

    def _end_window(self) -> None:
        self._gradients.after_step()
        if not self._clips_as_configured:
            self._gradients.set_clipping(self.configured_clipping)
        self._begin_window()

    def check_stepped(self) -> None:
        """At the end of a loader's epoch.

        Raises:
            UsageError: gradients were accumulated, but `optimizer.step()` was never called.
        """
        if self.window.forgotten and not self._native:
            raise UsageError(never_stepped(self.window))


def backward(
    steppers: Sequence[Stepper],
    loss: torch.Tensor,
    retain_graph: bool = False,
    scale_wrt_gas: bool = True,
    weight: Any = None,
) -> None:
    """One backward pass that serves every engine that took part in the loss.

    Args:
        steppers: all engines that have an optimizer.
        loss: scalar with a graph.
        retain_graph: keep the graph for another backward pass.
        scale_wrt_gas: divide by the gradient accumulation steps.
        weight: number of tokens of which the loss is the mean; then the step is on the mean over all tokens of the
            window and of all ranks, and nothing is divided by the gradient accumulation steps.
    """
    begin, run = (_begin_one, _backward_one) if len(steppers) == 1 else (_begin_several, _backward_several)
    try:
        divisor, scale = begin(steppers, scale_wrt_gas and weight is None, weight is not None)
        if steppers[0]._state.filler:  # this rank has no batch any more, but the others need it
            loss, weight = loss * 0, None if weight is None else 0
        relative = None if weight is None else steppers[0]._weights.relative(weight)
        if relative is not None:
            loss = loss * relative
        elif divisor > 1:
            loss = loss / divisor
        for stepper in _run_pass(run, steppers, loss, retain_graph, scale):
            stepper._count_backward(scale_wrt_gas, relative)
    finally:
        for stepper in steppers:
            if not stepper._reached:
                stepper._pass_by()


def _run_pass(
    run: Callable[..., Sequence[Stepper]],
    steppers: Sequence[Stepper],
    loss: torch.Tensor,
    retain_graph: bool,
    scale: float,
) -> Sequence[Stepper]:
    try:
        if not retain_graph:
            return run(steppers, loss, False, scale)
        with _keeping_graph(steppers):
            return run(steppers, loss, True, scale)
    except BaseException:
        for stepper in steppers:
            stepper._broken |= stepper._reached
        raise


@contextmanager
def _keeping_graph(steppers: Sequence[Stepper]) -> Iterator[None]:
    with ExitStack() as stack:
        for stepper in steppers:
            stack.enter_context(stepper._gradients.keeping_graph())
        yield


def _begin_one(steppers: Sequence[Stepper], divided: bool, weighted: bool) -> tuple[int, float]:
    """The pass of the only engine, which scales by itself; returns what the loss is divided and multiplied by."""
    (stepper,) = steppers
    stepper._begin_backward(weighted)
    stepper._admit()
    return stepper.window.size if divided else 1, 1.0


def _begin_several(steppers: Sequence[Stepper], divided: bool, weighted: bool) -> tuple[int, float]:
    """A pass that may reach several: one divisor, and the smallest loss scale of those in fp16."""
    divisor = max(stepper.steps for stepper in steppers) if divided else 1
    scale = min((stepper.loss_scale for stepper in steppers if stepper.loss_scale != 1.0), default=1.0)
    for stepper in steppers:
        share = stepper.loss_scale / scale * (divisor / stepper.steps if divided else 1.0)
        stepper._begin_backward(weighted, share, foreign_scale=stepper.loss_scale == 1.0 != scale)
    return divisor, scale


def _backward_one(
    steppers: Sequence[Stepper], loss: torch.Tensor, retain_graph: bool, scale: float
) -> Sequence[Stepper]:
    """Runs the pass; returns the engines that took part."""
    (stepper,) = steppers
    # engine.backward scales the loss for ZeRO optimizers only; the fp16 optimizer of stage 0 divides all the same.
    if not isinstance(stepper.engine.optimizer, ZeROOptimizer) and stepper._gradients.loss_scale != 1.0:
        loss = loss.float() * stepper._gradients.loss_scale
    DeepSpeedEngine.backward(stepper.engine, loss, retain_graph=retain_graph, scale_wrt_gas=False)
    return steppers


def _backward_several(
    steppers: Sequence[Stepper], loss: torch.Tensor, retain_graph: bool, scale: float
) -> Sequence[Stepper]:
    """Runs the pass; returns the engines that took part."""
    if scale != 1.0:
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
