"""What this rank holds of a prepared model: fp32 masters, optimizer state, frozen weights, buffers.

The only view of a running model that `checkpoint/` has. Every flat tensor of masters, wherever the optimizer keeps it,
is a `Shard`: it says which elements of which parameters lie in it, and opens it for reading or writing. Shards of
DeepSpeed's optimizers: `deepspeed_masters.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from zeroaccel.engine.plain_stepping import PlainStepper
from zeroaccel.engine.shards import logical_shape
from zeroaccel.errors import UnsupportedError, UsageError

WEIGHT, BUFFER, STATE = "weight", "buffer", "optimizer."

# Optimizers with one rule and one set of states under several names.
_RULES = {
    "AdamW": "Adam",
    "DeepSpeedCPUAdam": "Adam",
    "FusedAdam": "Adam",
    "DeepSpeedCPUAdagrad": "Adagrad",
    "DeepSpeedCPULion": "Lion",
    "FusedLion": "Lion",
}
_STATE_NAMES = {"DeepSpeedCPUAdagrad": {"exp_avg_sq": "sum"}}
# States of torch's optimizers that are one number: a parameter without dimensions has others of the same shape.
_NUMBERS = {"step", "mu_product", "eta", "mu"}
# How an optimizer computes, not what: the run that loads keeps its own.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable", "step"}


class Ownership(Enum):
    """Who writes what several ranks may have."""

    OWN = "this rank alone has it"
    SHARED = "all ranks have the same: each writes its part"
    FIRST = "every rank has its own: that of rank 0 counts"


@dataclass(frozen=True)
class Slice:
    """Consecutive elements of a flattened parameter.

    Attributes:
        name: of the parameter, as in the user's module.
        start: first element, counted in the parameter.
        count: number of elements.
        offset: where they begin in the shard's flat tensors.
    """

    name: str
    start: int
    count: int
    offset: int


@dataclass
class Group:
    """A param group, and the optimizer that steps it.

    Attributes:
        optimizer: the one that holds hyper-parameters and state, not DeepSpeed's around it.
        options: the live group.
        names: its trained parameters, in order.
    """

    optimizer: Any
    options: dict[str, Any]
    names: list[str]

    @property
    def rule(self) -> str:
        """What updates: optimizers of one rule can take over each other's state."""
        name = type(self.optimizer).__name__
        return _RULES.get(name, name)

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters, with what a scheduler or the script keeps there."""
        return {name: value for name, value in self.options.items() if name not in _IMPLEMENTATION}

    def set(self, settings: Mapping[str, Any]) -> None:
        """Sets what `settings` gave, in place: schedulers hold this dictionary."""
        for name, value in settings.items():
            current = self.options.get(name)
            if isinstance(current, torch.Tensor):
                current.fill_(float(value))
            else:
                self.options[name] = value.item() if isinstance(value, torch.Tensor) else value


class Shard:
    """Elements of parameters in one flat tensor, with the optimizer's state of them.

    Args:
        tensor: holds the masters (or a frozen parameter, or a buffer); the key of the optimizer's state.
        slices: what lies in it.
        kind: `WEIGHT` or `BUFFER`.
        group: None where nothing trains it.
        ownership: who writes it.
    """

    def __init__(
        self,
        tensor: Any,
        slices: Iterable[Slice],
        kind: str = WEIGHT,
        group: Group | None = None,
        ownership: Ownership = Ownership.OWN,
    ) -> None:
        self.tensor = tensor
        self.slices = tuple(slices)
        self.kind = kind
        self.group = group
        self.ownership = ownership

    @property
    def dtype(self) -> torch.dtype:
        """Of the masters."""
        return self.tensor.dtype  # type: ignore[no-any-return]

    def _state(self) -> dict[str, Any]:
        return {} if self.group is None else self.group.optimizer.state.get(self.tensor, {})

    def _renamed(self) -> dict[str, str]:
        return {} if self.group is None else _STATE_NAMES.get(type(self.group.optimizer).__name__, {})

    def state_dtypes(self) -> dict[str, torch.dtype]:
        """Names and dtypes of the states that have one value an element."""
        renamed = self._renamed()
        return {
            renamed.get(name, name): value.dtype
            for name, value in self._state().items()
            if self._is_elementwise(name, value)
        }

    def _is_elementwise(self, name: str, value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.shape != self.tensor.shape:
            return False
        return value.dim() > 0 or name not in _NUMBERS

    def numbers(self) -> dict[str, Any]:
        """The other states, the count of steps for one.

        Raises:
            UnsupportedError: one of them depends on how ZeRO has cut the parameters.
        """
        found = {name: value for name, value in self._state().items() if not self._is_elementwise(name, value)}
        if self.group is not None and type(self.group.optimizer).__name__ == "FusedAdam" and "step" in found:
            found["step"] = self._fused_steps(found["step"])
        for name, value in found.items():
            if self.ownership is Ownership.OWN and isinstance(value, torch.Tensor) and value.numel() > 1:
                raise UnsupportedError(
                    f"{type(self.group.optimizer).__name__} keeps {name!r} in a shape {tuple(value.shape)} of its own,"  # type: ignore[union-attr]
                    " which belongs to the way in which ZeRO has cut the parameters, so no checkpoint can hold it: use"
                    " zero_stage=0 or another optimizer"
                )
        return found

    def _fused_steps(self, own: int) -> int:
        # DeepSpeed's FusedAdam counts in the state of a group's last parameter, for all of them.
        state, parameters = self.group.optimizer.state, self.group.options["params"]  # type: ignore[union-attr]
        steps: list[int] = [state[parameter]["step"] for parameter in parameters if parameter in state]
        return max([own, *steps])

    @contextmanager
    def opened(
        self, write: bool = False, state: tuple[list[str], Mapping[str, Any]] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Flat tensors by kind (`weight`, `optimizer.exp_avg`), in memory as long as the block runs.

        Args:
            write: keep what the block writes into them.
            state: what the optimizer's state shall consist of, zeros where it is new: names of the states that have
                one value an element, and the others with their values. Nothing at all: as before the first step.
        """
        if state is not None:
            self._begin_state(*state)
        renamed = self._renamed()
        tensors = {self.kind: self.tensor.detach()}
        for name, value in self._state().items():
            if self._is_elementwise(name, value):
                tensors[STATE + renamed.get(name, name)] = value.detach()
        flat = {kind: tensor.reshape(-1) for kind, tensor in tensors.items()}
        yield flat
        if write:
            for kind, tensor in tensors.items():
                if not tensor.is_contiguous():  # the flat one is a copy
                    tensor.copy_(flat[kind].view(tensor.shape))
            self._written()

    def _written(self) -> None:
        """The weights are new: inside the block that opened them."""

    def _begin_state(self, names: list[str], numbers: Mapping[str, Any]) -> None:
        assert self.group is not None
        kept = self._state()
        if not names and not numbers:
            self._forget_state(kept)
            return
        own = {theirs: name for name, theirs in self._renamed().items()}
        state = self.group.optimizer.state[self.tensor]
        for name in (own.get(name, name) for name in names):
            if name not in state:
                state[name] = torch.zeros_like(self.tensor, requires_grad=False, memory_format=torch.preserve_format)
        for value in [value for name, value in state.items() if self._is_elementwise(name, value)]:
            value.zero_()
        for name, value in numbers.items():
            state[name] = self._as_kept(name, value, state.get(name))

    def _forget_state(self, kept: dict[str, Any]) -> None:
        if kept:
            self.group.optimizer.state.pop(self.tensor)  # type: ignore[union-attr]

    def _as_kept(self, name: str, value: Any, current: Any) -> Any:
        """The number as this optimizer keeps it: a tensor of its own, or a Python number."""
        single = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
        if not single or isinstance(value, bool):
            return value.to(self.tensor.device) if isinstance(value, torch.Tensor) else value
        number = float(value)
        if isinstance(current, torch.Tensor):
            return torch.full_like(current, number)
        optimizer, options = self.group.optimizer, self.group.options  # type: ignore[union-attr]
        if current is None and type(optimizer).__module__.startswith("torch."):
            on_device = options.get("capturable") or options.get("fused")
            return torch.tensor(number, device=self.tensor.device if on_device else "cpu")
        if isinstance(value, torch.Tensor) and not type(optimizer).__module__.startswith("deepspeed."):
            return value.clone()
        return int(number) if number.is_integer() else number


class Share:
    """What this rank holds of one prepared model.

    Attributes:
        module: the user's.
        trained: shards that an optimizer trains.
        groups: param groups with trained parameters, in order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trained: list[Shard] = []
        self.groups: list[Group] = []

    # --- what a backend adds ------------------------------------------------------------------------------------

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Around all access: weights are where shards look for them, and afterwards where the model does."""
        yield

    def refresh(self) -> None:
        """After new masters were written on every rank: brings the model's own weights in line. Collective."""

    def counters(self) -> dict[str, Any]:
        """Numbers of the engine that a resumed run goes on with, its loss scale among them."""
        return {}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Sets what `counters` gave."""

    def open_micro_batches(self) -> int:
        """Micro-batches that are backwarded, but not stepped on."""
        return 0

    def drop_gradients(self) -> None:
        """Throws away what was backwarded but not stepped on."""

    def gradient_layout(self) -> str:
        """Where the gradients of an open window lie: a run takes them over only where they lie in the same way."""
        return "plain PyTorch"

    def open_window(self) -> dict[str, Any] | None:
        """The open accumulation window with this rank's gradients; None where none is open.

        Raises:
            UsageError: its gradients are final already.
        """
        return None

    def set_open_window(self, window: Mapping[str, Any]) -> None:
        """Goes on with what `open_window` gave, in place of an empty one."""

    def _untrained(self, name: str, parameter: Any) -> Shard:
        return Shard(parameter, [Slice(name, 0, parameter.numel(), 0)], ownership=Ownership.SHARED)

    # --- what all have in common --------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """All of them: trained and other parameters, persistent buffers."""
        covered = {name for group in self.groups for name in group.names}
        others = [self._untrained(name, p) for name, p in self.module.named_parameters() if name not in covered]
        buffers = [
            Shard(buffer, [Slice(name, 0, buffer.numel(), 0)], BUFFER, ownership=Ownership.FIRST)
            for name, buffer in self.buffers().items()
        ]
        return [*self.trained, *others, *buffers]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters."""
        return {name: tuple(logical_shape(parameter)) for name, parameter in self.module.named_parameters()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes that the model computes with."""
        return {name: parameter.dtype for name, parameter in self.module.named_parameters()}

    def frozen(self) -> set[str]:
        """Parameters that need no gradient."""
        return {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}

    def tied(self) -> dict[str, str]:
        """Further names of parameters: other name -> first name."""
        first = {id(parameter): name for name, parameter in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers."""
        lasting = {
            id(buffer)
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }
        return {name: buffer for name, buffer in self.module.named_buffers() if id(buffer) in lasting}

    def extra_state(self) -> dict[str, Any]:
        """What modules add to their state dict that is no tensor of theirs."""
        return {
            name: module.get_extra_state()
            for name, module in self.module.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def set_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Sets what `extra_state` gave, for the modules that are there."""
        for name, module in self.module.named_modules():
            if name in extra:
                module.set_extra_state(extra[name])


def names_of(module: nn.Module) -> dict[int, str]:
    """Name of each parameter, by its `id`."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def whole_shards(group: Group, masters: Iterable[tuple[str, Any]]) -> Iterator[Shard]:
    """One shard a parameter, of an optimizer that has all of them on every rank."""
    for name, master in masters:
        slices = [Slice(name, 0, master.numel(), 0)]
        yield Shard(master, slices, group=group, ownership=Ownership.SHARED)


def add_plain_masters(share: Share, optimizers: Iterable[Any]) -> None:
    """Adds what an unsharded optimizer trains: the model's own parameters are the masters.

    Args:
        share: of the model.
        optimizers: those that may train it.
    """
    names = names_of(share.module)
    for optimizer in optimizers:
        for options in optimizer.param_groups:
            own = {names[id(p)]: p for p in options["params"] if id(p) in names and p.requires_grad}
            if own:
                group = Group(optimizer, options, list(own))
                share.groups.append(group)
                share.trained += whole_shards(group, own.items())


class PlainShare(Share):
    """What there is of a model without DeepSpeed: all of it.

    Args:
        module: the user's.
        steppers: what drives the run's optimizers, those of other models too.
        scaler: the gradient scaler, or None.
    """

    def __init__(self, module: nn.Module, steppers: Iterable[PlainStepper], scaler: Any) -> None:
        super().__init__(module)
        self._scaler = scaler
        add_plain_masters(self, [stepper.optimizer for stepper in steppers])
        used = {id(group.optimizer) for group in self.groups}
        self._steppers = [stepper for stepper in steppers if id(stepper.optimizer) in used]

    def counters(self) -> dict[str, Any]:
        if self._scaler is None:
            return {}
        return {"cur_scale": self._scaler.get_scale(), "grad_scaler": self._scaler.state_dict()}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        if self._scaler is not None and "cur_scale" in counters:
            state = counters.get("grad_scaler") or {**self._scaler.state_dict(), "scale": counters["cur_scale"]}
            self._scaler.load_state_dict(state)

    def open_micro_batches(self) -> int:
        return max((stepper.window.micro_batches for stepper in self._steppers), default=0)

    def open_window(self) -> dict[str, Any] | None:
        if not self.open_micro_batches():
            return None
        if any(stepper._corrected or stepper._unscaled for stepper in self._steppers):
            raise UsageError(
                "the gradients of this accumulation window were clipped or unscaled: save before that, or after"
                " optimizer.step()"
            )
        return {
            "gradients": {name: p.grad.cpu() for name, p in self.module.named_parameters() if p.grad is not None},
            "windows": [stepper.window.state_dict() for stepper in self._steppers],
            "units": [stepper._weights._unit for stepper in self._steppers],
        }

    def set_open_window(self, window: Mapping[str, Any]) -> None:
        for name, parameter in self.module.named_parameters():
            if name in window["gradients"]:
                parameter.grad = window["gradients"][name].to(parameter.device)
        for stepper, state, unit in zip(self._steppers, window["windows"], window["units"], strict=True):
            stepper.window.load_state_dict(state)
            stepper._weights._unit = unit if unit is not None else stepper._weights._unit

    def drop_gradients(self) -> None:
        for stepper in self._steppers:
            stepper.optimizer.zero_grad()
            stepper._close()
            stepper.window.forget_blocks()
