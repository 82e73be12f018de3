"""A parameter's whole fp32 weight and optimizer state, readable and settable on every stage and under every offload.

`deepspeed.utils.safe_get_full_fp32_param` and its siblings end in methods of the parameter (stages 1 and 2) or of the
optimizer (stage 3). DeepSpeed's own know nothing at stage 0 and of frozen parameters, which they leave as they are
without a word; fail where the ranks do not divide a parameter; hand out memory that the next read overwrites (NVMe);
and leave the model's own weights as they were until the next step. Here these methods have none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from zeroaccel.engine.masters import STATE, WEIGHT, Ownership, Shard, Share, Slice, names_of
from zeroaccel.engine.shards import is_here, logical_shape
from zeroaccel.errors import ConfigError, UsageError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet


def give_access(engine: Any, share: Callable[[Any], Share]) -> None:
    """Has DeepSpeed's access functions read and write what this rank holds of an engine's model.

    Args:
        engine: with an optimizer.
        share: gives what this rank holds of it.
    """
    access = _Access(engine, share)
    sharded = engine.optimizer
    if isinstance(sharded, DeepSpeedZeroOptimizer_Stage3):
        sharded.get_full_hp_param, sharded.set_full_hp_param = access.read, access.write
        sharded.get_local_fp32_param, sharded.set_local_hp_param = access.read_part, access.write_part
        return
    for parameter in engine.module.parameters():
        access.attach(parameter)


class _Access:
    """Reads and writes masters and optimizer state by parameter."""

    def __init__(self, engine: Any, share: Callable[[Any], Share]) -> None:
        self._engine = engine
        self._share_of = share
        self._shards: list[Shard] | None = None
        self._names = names_of(engine.module)

    def attach(self, parameter: Any) -> None:
        """Gives a parameter below stage 3 the methods that DeepSpeed's functions call."""
        if not hasattr(parameter, "_hp_mapping"):  # stage 0, or frozen
            parameter._hp_mapping = None
            parameter.get_full_hp_grad = lambda: None
            parameter.set_full_hp_grad = lambda value: self._refuse_gradient(parameter)
        parameter.get_full_hp_param = partial(self.read, parameter)
        parameter.set_full_hp_param = lambda value, optim_state_key=None: self.write(value, parameter, optim_state_key)

    def _refuse_gradient(self, parameter: Any) -> None:
        raise UsageError(
            f"a parameter of shape {tuple(parameter.shape)} has no gradient to set: it is frozen, or the backward pass"
            " did not reach it"
        )

    def _parts(self, parameter: Any) -> list[tuple[Shard, list[Slice]]]:
        """Shards of the parameter's group on this rank, with its slices there; nothing for a frozen one."""
        if self._shards is None:
            self._shards = self._share_of(self._engine).trained
        name = self._names[id(parameter)]
        own = [shard for shard in self._shards if shard.group is not None and name in shard.group.names]
        return [(shard, [part for part in shard.slices if part.name == name]) for shard in own]

    # --- whole --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        """The whole value on every rank, a copy; None for a frozen parameter. Collective."""
        parts, kind = self._parts(param), _kind(optim_state_key)
        if not parts:
            return None
        self._check(param, parts, kind, "reading")
        whole = torch.zeros(logical_shape(param).numel(), dtype=torch.float32, device=self._engine.device)
        for shard, slices in parts:
            if not slices:
                continue
            with shard.opened() as tensors:
                for part in slices:
                    source = tensors[kind].narrow(0, part.offset, part.count)
                    whole.narrow(0, part.start, part.count).copy_(source)
        if parts[0][0].ownership is Ownership.OWN:
            torch.distributed.all_reduce(whole, group=getattr(param, "ds_process_group", None))
        return whole.view(logical_shape(param))

    @torch.no_grad()
    def write(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """Sets the whole value, the same on all ranks; a weight is what the model computes with at once. Collective."""
        parts, kind, shape = self._parts(param), _kind(optim_state_key), logical_shape(param)
        if not parts:
            raise UsageError(
                f"a frozen parameter of shape {tuple(shape)} has neither fp32 weight nor optimizer state: change it"
                " inside `with accelerator.gathered_parameters(parameter, modify=True):`"
            )
        if value.numel() != shape.numel():
            raise ConfigError(f"the new value has shape {tuple(value.shape)}, the parameter {tuple(shape)}")
        self._check(param, parts, kind, "setting")
        flat = value.detach().reshape(-1)
        for shard, slices in parts:
            if not slices:
                continue
            with shard.opened(write=True) as tensors:
                for part in slices:
                    source = flat.narrow(0, part.start, part.count)
                    tensors[kind].narrow(0, part.offset, part.count).copy_(source)
        if kind == WEIGHT and is_here(param):
            param.data.copy_(value.view(shape))

    def _check(self, param: Any, parts: list[tuple[Shard, list[Slice]]], kind: str, what: str) -> None:
        """Raises on all ranks where the state is not there."""
        get_accelerator().synchronize()  # DeepSpeed copies to and from host memory without waiting
        there: set[str] = set()
        if kind != WEIGHT:
            with parts[0][0].opened() as tensors:
                there = {name.removeprefix(STATE) for name in tensors if name.startswith(STATE)}
        missing = kind != WEIGHT and kind.removeprefix(STATE) not in there
        outline = f"{kind} of a parameter of shape {tuple(logical_shape(param))}"
        if meet(PartialState(), f"{what} a parameter's value", outline, "ask for the same on all ranks", flag=missing):
            raise UsageError(
                f"{type(self._engine.basic_optimizer).__name__} has no state {kind.removeprefix(STATE)!r}: "
                + (f"it has {', '.join(sorted(there))}" if there else "there is none before the first optimizer step")
            )

    # --- this rank's part, at stage 3 ---------------------------------------------------------------------------

    @torch.no_grad()
    def read_part(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        """This rank's part, padded, a copy; None for a frozen parameter."""
        for shard, slices in self._parts(param):
            for part in slices:
                with shard.opened() as tensors:
                    source = self._own(tensors, _kind(optim_state_key)).narrow(0, part.offset, param.partition_numel())
                    return source.to(self._engine.device, copy=True)
        return None

    @torch.no_grad()
    def write_part(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """Sets this rank's part, padded."""
        size = param.partition_numel()
        if value.numel() != size:
            raise ConfigError(f"the new value has {value.numel()} elements, this rank's part of the parameter {size}")
        for shard, slices in self._parts(param):
            for part in slices:
                with shard.opened(write=True) as tensors:
                    own = self._own(tensors, _kind(optim_state_key)).narrow(0, part.offset, size)
                    own.copy_(value.detach().reshape(-1))

    def _own(self, tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        if kind not in tensors:
            raise UsageError(
                f"{type(self._engine.basic_optimizer).__name__} has no state {kind.removeprefix(STATE)!r}, or none"
                " before the first optimizer step"
            )
        return tensors[kind]


def _kind(optim_state_key: str | None) -> str:
    return WEIGHT if optim_state_key is None else STATE + optim_state_key
