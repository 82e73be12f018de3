"""`deepspeed.initialize`, without what its constructors silently do to the user's optimizer (DeepSpeed 0.19.8).

- Stage 0 in 16 bit takes a hidden step with zero gradients: weight decay shrinks the masters, Adam counts from 1.
- ZeRO makes torch's Adagrad anew from its defaults: param groups lose their own learning rate and weight decay.
- Stage 0 in fp16 begins at loss scale 65536 whatever `initial_scale_power` says, unless the optimizer is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize(**arguments)`: engine, optimizer, loader and scheduler."""
    with _honest_states():
        engine, optimizer, loader, scheduler = deepspeed.initialize(**arguments)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer) and engine.fp16_enabled() and engine.dynamic_loss_scale():
        engine.optimizer.loss_scale_config.cur_scale = float(engine.initial_dynamic_scale())
    return engine, optimizer, loader, scheduler


@contextmanager
def _honest_states() -> Iterator[None]:
    """DeepSpeed's optimizers make their state without stepping and without replacing the optimizer inside."""
    zero: tuple[Any, ...] = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    wrappers: tuple[Any, ...] = (FP16_Optimizer, FP16_UnfusedOptimizer)
    originals = {kind: kind.initialize_optimizer_states for kind in (*zero, *wrappers)}
    for kind in zero:
        kind.initialize_optimizer_states = _keeping_optimizer(kind.initialize_optimizer_states)
    for kind in wrappers:
        kind.initialize_optimizer_states = _hand_over_state
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.initialize_optimizer_states = original


def _keeping_optimizer(initialize_states: Callable[[Any], None]) -> Callable[[Any], None]:
    def initialize_and_keep(sharded: Any) -> None:
        own = sharded.optimizer
        initialize_states(sharded)
        if sharded.optimizer is not own:
            own.state.clear()
            own.state.update(sharded.optimizer.state)
            sharded.optimizer = own

    return initialize_and_keep


def _hand_over_state(wrapper: Any) -> None:
    """State that the optimizer made at birth (Adagrad) moves from the 16-bit weights to their fp32 masters."""
    if isinstance(wrapper, FP16_Optimizer):  # for FusedAdam, which makes its state at the first step
        return
    state = wrapper.optimizer.state
    for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            if weight in state:
                made = state.pop(weight).items()
                state[master] = {name: value.float() if torch.is_tensor(value) else value for name, value in made}
