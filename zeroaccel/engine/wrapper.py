"""`accelerator.deepspeed_engine_wrapped`, which scripts and libraries reach for."""

from __future__ import annotations

from typing import Any

import torch


class DeepSpeedEngineWrapper:
    """An engine with the loop of DeepSpeed's own: `backward` updates the weights, too.

    Attributes:
        engine: the `DeepSpeedEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Runs the engine's own backward pass and, with `sync_gradients`, its step, as DeepSpeed's loop does."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.engine.step()

    def get_global_grad_norm(self) -> float | None:
        """Norm before clipping of the last step, None before the first."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else None
