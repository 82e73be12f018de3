"""Models that are prepared to answer, not to train: gradients run through them, and ranks generate in step."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch


def take_no_gradients(engine: Any) -> None:
    """Lets a backward pass run through an engine that has no optimizer, as it does through any frozen module.

    DeepSpeed's own preparations for the pass ask that optimizer.
    """
    engine._backward_prologue = partial(_begin_backward, engine)
    engine._backward_prologue_per_tensor = lambda gradient: gradient


def _begin_backward(engine: Any) -> None:
    if engine.zero_optimization_stage() == 3:
        let_go_after_backward(engine.optimizer)


def let_go_after_backward(offload: Any) -> None:
    """Within a backward pass: at its end stage 3 lets go of weights that it fetched and that nothing has released.

    Args:
        offload: DeepSpeed's `DeepSpeedZeRoOffload`.
    """
    torch.autograd.Variable._execution_engine.queue_callback(offload.release_backward_leftovers)


def generate_in_step(module: torch.nn.Module) -> None:
    """Has `generate` of transformers' models call `forward` as often on every rank, since stage 3 gathers in it.

    By itself transformers does so only where it was told to build models partitioned.
    """
    library = sys.modules.get("transformers.generation")
    if library is None:
        return
    for model in module.modules():
        if isinstance(model, library.GenerationMixin):
            model.generate = partial(model.generate, synced_gpus=True)
