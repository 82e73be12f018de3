"""Losses that are means over different numbers of tokens: their common mean over the window and all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from zeroaccel.errors import ConfigError, UsageError


class LossWeights:
    """Weights relative to a unit on which all ranks agreed, so that weighted losses keep the size of plain ones.

    A loss multiplied by a token count of thousands would overflow in fp16 under a static loss scale.

    Args:
        device: where tensors of collectives live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unit: float | None = None

    def relative(self, weight: Any) -> float:
        """`weight` in units; at the first call collective.

        Raises:
            ConfigError: the weight is negative, not finite or no number.
        """
        try:
            value = float(weight)
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if not 0.0 <= value < math.inf:
            raise ConfigError(
                f"backward(loss, weight={weight!r}): write the number of tokens (or samples) in this loss"
            )
        if self._unit is None:
            self._unit = self._combine(value, dist.ReduceOp.MAX) or 1.0
        return value / self._unit

    def factor(self, own: float) -> float:
        """What the window's gradients, averaged over the ranks, must be multiplied with. Collective.

        Args:
            own: sum of this rank's relative weights of the window.

        Raises:
            UsageError: no rank has any weight.
        """
        total = self._combine(own, dist.ReduceOp.SUM)
        if total == 0.0:
            raise UsageError(
                "all weights of this accumulation window are 0, on every rank: there is nothing to step on"
            )
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return ranks / total

    def _combine(self, value: float, operation: Any) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, operation)
        return float(tensor)
