"""Local SGD, which only one process without DeepSpeed can be asked for."""

from __future__ import annotations

from typing import Any

from zeroaccel.accelerator import Accelerator
from zeroaccel.config.types import DistributedType
from zeroaccel.errors import UnsupportedError


class LocalSGD:
    """Does nothing where there is nothing to average: one process, or `enabled=False`.

    Args:
        accelerator: of the run.
        model: the prepared model.
        local_sgd_steps: how often weights would be averaged.
        enabled: whether they should be.

    Raises:
        UnsupportedError: on several ranks or under DeepSpeed.
    """

    def __init__(self, accelerator: Accelerator, model: Any, local_sgd_steps: int, enabled: bool = True) -> None:
        if enabled and accelerator.distributed_type is not DistributedType.NO:
            raise UnsupportedError(
                "LocalSGD averages whole weights, which no rank has under ZeRO: gradient_accumulation_steps spares as"
                " much traffic; or pass enabled=False"
            )

    def __enter__(self) -> LocalSGD:
        return self

    def __exit__(self, *problem: Any) -> None:
        """Nothing to average."""

    def step(self) -> None:
        """Nothing to count."""
