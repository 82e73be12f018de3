"""The optimizers that users hold: `DummyOptim` before `prepare()`, `AcceleratedOptimizer` after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zeroaccel.engine.plain_stepping import PlainStepper
from zeroaccel.errors import UnsupportedError, UsageError
from zeroaccel.state import AcceleratorState, GradientState

if TYPE_CHECKING:
    from zeroaccel.engine.stepping import Stepper


class DummyOptim:
    """Stands for the optimizer that the DeepSpeed config describes; its values fill the config's `auto` fields.

    Args:
        params: parameters or param groups to optimize.
        lr: learning rate for `optimizer.params.lr`.
        weight_decay: for `optimizer.params.weight_decay`.
        kwargs: further values, e.g. `betas` and `eps`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs


class Steps(Protocol):
    """What drives an optimizer: the accumulation window decides what a call means."""

    step_was_skipped: bool

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


class AcceleratedOptimizer(torch.optim.Optimizer):
    """A prepared optimizer: `step` and `zero_grad` do what the accumulation window allows.

    Args:
        optimizer: the optimizer that really steps.
        device_placement: move the optimizer's state to the device of this process.
        scaler: gradient scaler of fp16 autocast, without DeepSpeed.
        steps: what drives it; default: plain PyTorch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device_placement: bool = True,
        scaler: Any = None,
        steps: Steps | None = None,
    ) -> None:
        # No super().__init__: groups and state are those of the optimizer inside.
        self.optimizer = optimizer
        self.scaler = scaler
        self.accelerator_state = AcceleratorState()
        self.gradient_state = GradientState()
        self.device_placement = device_placement
        self._steps = steps or PlainStepper(optimizer, self.gradient_state, scaler)
        if device_placement and optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # which moves state to its parameter's device

    @property
    def state(self) -> Any:
        """State of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Param groups of the optimizer inside; assigning a group's `lr` takes effect."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the PyTorch optimizer inside; DeepSpeed's around it has none."""
        inner: Any = self.optimizer
        while not hasattr(inner, "defaults"):
            inner = inner.optimizer
        return inner.defaults  # type: ignore[no-any-return]

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer inside."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer inside; under ZeRO, of this rank's partition."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Throws the gradients away, unless an accumulation window is open. They become None or zero, as it pleases
        what holds them, whatever `set_to_none` says."""
        self._steps.zero_grad()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters if this call closes the accumulation window; else does nothing.

        Raises:
            UsageError: a closure was given, which an accumulated step cannot call again.
        """
        if closure is not None:
            raise UsageError(
                "optimizer.step(closure) cannot be accumulated or sharded: run the closure's backward first"
            )
        self._steps.step()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last real step was given up because gradients overflowed in fp16."""
        return self._steps.step_was_skipped

    def train(self) -> None:
        """Training mode, for optimizers that have one (schedule-free)."""
        self._switch("train")

    def eval(self) -> None:
        """Evaluation mode, for optimizers that have one (schedule-free)."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        inner: Any = self.optimizer
        while inner is not None:
            if callable(switch := getattr(inner, mode, None)):
                switch()
                return
            inner = getattr(inner, "optimizer", None)  # DeepSpeed wraps the optimizer that has the mode

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
    """The optimizer of an engine; `optimizer` is DeepSpeed's, which holds the sharded fp32 masters."""

    def __init__(self, optimizer: torch.optim.Optimizer, stepper: Stepper | None = None) -> None:
        super().__init__(optimizer, device_placement=False, scaler=None, steps=stepper)

    @property
    def engine(self) -> Any:
        """The engine whose optimizer this is."""
        return self._steps.engine  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible any more.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"add_param_group after prepare(): {type(self.optimizer).__name__} has laid out its parameters already; add"
            " the group before prepare(). A layer that is to be trained later can be there from the start with lr=0"
        )
