"""`deepspeed.initialize`, without what its constructors do wrong to the user's model and optimizer (DeepSpeed 0.19.8).

- A parameter without dimensions fails in the first broadcast.
- Gradients on NVMe come back as garbage, without an error, where they begin between two blocks of the disk.
- Stage 0 in 16 bit takes a hidden step with zero gradients: weight decay shrinks the masters, Adam counts from 1.
- ZeRO makes torch's Adagrad anew from its defaults: param groups lose their own learning rate and weight decay.
- Stage 0 in fp16 begins at loss scale 65536 whatever `initial_scale_power` says, unless the optimizer is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from zeroaccel.engine import birth, ops
from zeroaccel.engine.compat import check_engine


def initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize(**arguments)`: engine, optimizer, loader and scheduler."""
    ops.build(ops.needed(arguments["config"]))
    with birth.suspended(), _patched():
        engine, optimizer, loader, scheduler = deepspeed.initialize(**arguments)
    if arguments.keys() & {"optimizer", "model_parameters"}:  # else DeepSpeed may still wrap a dummy
        check_engine(engine)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer) and engine.fp16_enabled() and engine.dynamic_loss_scale():
        engine.optimizer.loss_scale_config.cur_scale = float(engine.initial_dynamic_scale())
    if (swapper := getattr(engine.optimizer, "optimizer_swapper", None)) is not None:
        swapper._adjust_for_misaligned_lengths = partial(_cut_at_blocks, swapper)
    return engine, optimizer, loader, scheduler


def _cut_at_blocks(swapper: Any, tensors: list[Any], offsets: list[int]) -> tuple[list[Any], list[int]]:
    """Cuts gradients so that what goes to the disk begins and ends at a block; the small rest stays in memory."""
    pieces: list[tuple[Any, int]] = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        if not swapper.is_swappable_tensor(tensor=tensor):
            pieces.append((tensor, offset))
            continue
        size, block = tensor.numel(), swapper.numel_alignment
        head = -offset % block
        body = (size - head) // block * block
        bounds = [0, head, head + body, size]
        pieces += [(tensor.narrow(0, a, b - a), offset + a) for a, b in pairwise(bounds) if b > a]
    return [tensor for tensor, _ in pieces], [offset for _, offset in pieces]


@contextmanager
def _patched() -> Iterator[None]:
    zero: tuple[Any, ...] = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    methods: list[tuple[Any, str, Any]] = [
        *((kind, "initialize_optimizer_states", _keeping_optimizer(kind.initialize_optimizer_states)) for kind in zero),
        (FP16_UnfusedOptimizer, "initialize_optimizer_states", _hand_over_state),
        # FusedAdam makes its state at the first step.
        (FP16_Optimizer, "initialize_optimizer_states", lambda self: None),
        (DeepSpeedEngine, "_broadcast_model", _with_dimensions(DeepSpeedEngine._broadcast_model)),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]
    for owner, name, method in methods:
        setattr(owner, name, method)
    try:
        yield
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def _with_dimensions(broadcast_model: Callable[[Any], None]) -> Callable[[Any], None]:
    """Parameters without dimensions have one for as long as they are broadcast as bytes."""

    def broadcast(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        broadcast_model(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    return broadcast


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
    state = wrapper.optimizer.state
    for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            if weight in state:
                made = state.pop(weight).items()
                state[master] = {name: value.float() if torch.is_tensor(value) else value for name, value in made}
