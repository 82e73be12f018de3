"""Picklable objects between ranks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from zeroaccel.config.types import DistributedType
from zeroaccel.distributed.nested import leaves, recursively_apply
from zeroaccel.errors import DistributedError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet


@dataclass(frozen=True)
class _Packed:
    """An object as bytes, or why it has none: so that a failed pickle reaches the other ranks, too."""

    data: bytes | None
    problem: str = ""


def _pack(value: Any) -> _Packed:
    try:
        return _Packed(pickle.dumps(value))
    except Exception as error:
        return _Packed(None, f"{type(value).__name__}: {error}")


def _unpack(packed: list[_Packed], first_rank: int = 0) -> list[Any]:
    problems = {rank: one.problem for rank, one in enumerate(packed, first_rank) if one.data is None}
    if problems:
        lines = "".join(f"\n  rank {rank}: {problem}" for rank, problem in problems.items())
        raise DistributedError(f"an object cannot be pickled, so it cannot be sent to the other ranks{lines}")
    return [pickle.loads(one.data) for one in packed if one.data is not None]


def _on_cpu(value: Any) -> Any:
    # A tensor of a GPU would be unpickled on the GPU of the rank that sent it.
    if all(leaf.device.type == "cpu" for leaf in leaves(value) if isinstance(leaf, torch.Tensor)):
        return value
    return recursively_apply(lambda tensor: tensor.cpu(), value)


def all_objects(value: Any, name: str = "an exchange between the ranks") -> list[Any]:
    """`value` of every rank, in order of rank. Collective.

    Args:
        value: what this rank gives.
        name: function that the script called, for errors.

    Raises:
        DistributedError: on every rank, if one rank's object cannot be pickled; on those that came, if one did not.
    """
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    meet(state, name)
    packed: list[Any] = [None] * state.num_processes
    torch.distributed.all_gather_object(packed, _pack(value))
    return _unpack(packed)


def gather_object(object: Any) -> list[Any]:
    """The lists of all ranks as one list, in order of rank. Collective.

    Args:
        object: a list (or other iterable) of picklable objects. A mapping, a string, and what cannot be
            iterated count as one object.

    Returns:
        A list, in which tensors are on the CPU; where there is only one process and no DeepSpeed, `object` as it is.

    Raises:
        DistributedError: on every rank, if one rank's object cannot be pickled.
    """
    if PartialState().distributed_type == DistributedType.NO:
        return object  # type: ignore[no-any-return]
    gathered: list[Any] = []
    for part in all_objects(_on_cpu(object), "gather_object"):
        gathered.extend(part if _is_many(part) else [part])
    return gathered


def _is_many(value: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping)):
        return False
    return value.ndim > 0 if isinstance(value, torch.Tensor) else hasattr(value, "__iter__")


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrites the list's elements with those of rank `from_process`. Collective.

    Args:
        object_list: a list of one length on all ranks.
        from_process: the sending rank.

    Returns:
        The same list.

    Raises:
        DistributedError: on every rank, if an object cannot be pickled, or the lists differ in length.
    """
    state = PartialState()
    if state.num_processes == 1:
        return object_list
    outline = f"a list of {len(object_list)} from rank {from_process}"
    meet(state, "broadcast_object_list", outline, "give all ranks a list of one length and the same from_process")
    sends = state.process_index == from_process
    message = [_pack(list(object_list)) if sends else None]
    torch.distributed.broadcast_object_list(message, src=from_process)
    (received,) = _unpack([message[0]], from_process)  # type: ignore[list-item]
    if not sends:
        object_list[:] = received
    return object_list
