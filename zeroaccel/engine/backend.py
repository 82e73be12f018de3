"""The door to what runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from zeroaccel.config import environment
from zeroaccel.config.facts import ResolvedConfig
from zeroaccel.engine.masters import Share
from zeroaccel.state import AcceleratorState, GradientState


@dataclass(frozen=True)
class Setup:
    """What an `Accelerator` tells its backend once.

    Attributes:
        prepare_loader: shards a loader and moves its batches.
        device_placement: whether models are moved to the device.
        split_batches: whether a loader's batch size is that of all ranks together.
        step_scheduler_with_optimizer: see `AcceleratedScheduler`.
        accumulation_typed: whether the script typed its gradient accumulation steps.
        implicit_plugin: whether DeepSpeed was chosen only because there are several processes.
        scaler_options: keyword arguments of the gradient scaler without DeepSpeed.
        autocast_options: keyword arguments of `torch.autocast` without DeepSpeed.
    """

    prepare_loader: Callable[[DataLoader[Any]], DataLoader[Any]]
    device_placement: bool = True
    split_batches: bool = False
    step_scheduler_with_optimizer: bool = True
    accumulation_typed: bool = False
    implicit_plugin: bool = False
    scaler_options: dict[str, Any] = field(default_factory=dict)
    autocast_options: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """What both backends do, `engine/deepspeed.py` and `engine/plain.py`."""

    scaler: Any

    def prepare(self, objects: tuple[Any, ...], device_placement: list[bool] | None) -> tuple[Any, ...]:
        """Prepares models, optimizers, schedulers and loaders; in the caller's order."""
        ...

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Accumulates gradients."""
        ...

    def accumulation(self, models: Sequence[Any], at_end: bool) -> AbstractContextManager[None]:
        """One block of `accumulate(*models)`, which closes anyway where the loader ends."""
        ...

    def follow_accumulation(self) -> None:
        """The script assigned its gradient accumulation steps after `prepare()`."""
        ...

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float) -> torch.Tensor:
        """Clips the coming step by norm and returns the norm before."""
        ...

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clips the coming step element by element."""
        ...

    def unscale_gradients(self, optimizers: list[Any]) -> None:
        """Divides gradients by the scaler's factor."""
        ...

    def autocast(self, options: dict[str, Any] | None) -> AbstractContextManager[Any]:
        """Mixed precision for code outside the model."""
        ...

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepares a scheduler on its own."""
        ...

    def share(self, model: Any) -> Share:
        """What this rank holds of a prepared model, for checkpoints."""
        ...

    def explanation(self) -> ResolvedConfig | None:
        """What the newest `prepare()` resolved, with sources."""
        ...

    def release(self) -> None:
        """Lets go of all engines."""
        ...


def make_backend(setup: Setup, state: AcceleratorState, gradient_state: GradientState) -> Backend:
    """The backend that `state` asks for."""
    if state.deepspeed_plugin is None:
        from zeroaccel.engine.plain import PlainBackend

        return PlainBackend(setup, state, gradient_state)
    if state.device.type == "cpu":
        environment.choose_cpu_accelerator()  # before DeepSpeed is imported
    from zeroaccel.engine.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(setup, state, gradient_state)
