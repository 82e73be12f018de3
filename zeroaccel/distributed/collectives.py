"""Tensors between ranks. Every function here that asks other ranks must be called by all of them.

`gather`, `reduce` and `broadcast` compare the shapes first, with one exchange of 16 bytes a rank whatever the data
(`state/meeting.py`): a mismatch would otherwise hang, crash in the backend, or give garbage.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from zeroaccel.config.types import DistributedType
from zeroaccel.distributed.nested import leaves, recursively_apply
from zeroaccel.distributed.objects import all_objects
from zeroaccel.errors import ConfigError, ConfigTypeError, DistributedError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor was left as it is by `pad_across_processes`."""


def gather(tensor: Any) -> Any:
    """Tensors of all ranks, joined along the first dimension in order of rank. Collective.

    Args:
        tensor: nested lists, tuples and mappings of tensors of one shape and dtype on all ranks. One without
            dimensions counts as one of shape [1].

    Returns:
        The same structure; shapes [world size * n, ...]. Unchanged where there is one process and no DeepSpeed.

    Raises:
        DistributedError: on every rank, if shapes, dtypes or structures differ.
        ConfigTypeError: on every rank, if a leaf is no tensor.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.NO:
        return tensor
    check_agreement("gather", tensor, "pad with `accelerator.pad_across_processes`, or gather as objects")
    return recursively_apply(lambda one: _gather_one(one, state), tensor)


def _gather_one(tensor: torch.Tensor, state: PartialState) -> torch.Tensor:
    if tensor.ndim == 0:
        tensor = tensor.clone()[None]
    if state.num_processes == 1:
        return tensor
    tensor = tensor.contiguous()
    if state.backend == "gloo":
        parts = [torch.empty_like(tensor) for _ in range(state.num_processes)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)
    gathered = tensor.new_empty((state.num_processes * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Combines each tensor over the ranks, element by element. Collective.

    Args:
        tensor: nested lists, tuples and mappings of tensors of one shape and dtype on all ranks; not changed.
        reduction: "mean", "sum", "max", or "none" for this rank's own values. The mean of integers is a float.
        scale: has an effect on XLA only, so none here.

    Raises:
        ConfigError: `reduction` is none of these.
        DistributedError: on every rank, if shapes, dtypes or structures differ.
        ConfigTypeError: on every rank, if a leaf is no tensor.
    """
    if reduction not in ("mean", "sum", "max", "none"):
        raise ConfigError(f"reduction={reduction!r} is unknown: write 'mean', 'sum', 'max' or 'none'")
    world_size = PartialState().num_processes
    check_agreement("reduce", tensor, "reduce what has one shape on all ranks, for example a sum")

    def reduce_one(one: torch.Tensor) -> torch.Tensor:
        result = one.clone(memory_format=torch.contiguous_format)
        if world_size > 1 and reduction != "none":
            dist.all_reduce(result, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
        return result / world_size if reduction == "mean" else result

    return recursively_apply(reduce_one, tensor)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Overwrites tensors with those of rank `from_process`, in place. Collective.

    Args:
        tensor: nested lists, tuples and mappings of tensors of one shape and dtype on all ranks.
        from_process: the sending rank.

    Returns:
        The same structure with the same tensors.

    Raises:
        DistributedError: on every rank, if shapes, dtypes or structures differ.
        ConfigTypeError: on every rank, if a leaf is no tensor.
    """
    if PartialState().num_processes == 1:
        return tensor
    remedy = "make room for what is sent first, or use `broadcast_object_list`"
    check_agreement(f"broadcast(from_process={from_process})", tensor, remedy)
    return recursively_apply(lambda one: broadcast_one(one, from_process), tensor)


def broadcast_one(tensor: torch.Tensor, from_process: int) -> torch.Tensor:
    """`broadcast` for one tensor whose shape is known to agree."""
    with torch.no_grad():
        if tensor.is_contiguous():
            dist.broadcast(tensor, src=from_process)
        else:
            sent = tensor.contiguous()
            dist.broadcast(sent, src=from_process)
            tensor.copy_(sent)
    return tensor


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor that only one rank has, on all of them. Collective.

    Args:
        tensor: the tensor on one rank, None on the others, which need not know its shape.

    Raises:
        DistributedError: on every rank, if not exactly one rank has a tensor.
    """
    state = PartialState()
    known = all_objects(None if tensor is None else (tuple(tensor.shape), tensor.dtype), "copy_tensor_to_devices")
    owners = [rank for rank, information in enumerate(known) if information is not None]
    if len(owners) != 1:
        raise DistributedError(
            f"copy_tensor_to_devices needs the tensor on exactly one rank, None on the others; given by ranks {owners}"
        )
    if state.num_processes == 1 and tensor is not None:
        return tensor.to(state.device)
    shape, dtype = known[owners[0]]
    room = torch.empty(shape, dtype=dtype, device=state.device) if tensor is None else tensor.to(state.device)
    return broadcast_one(room.contiguous(), owners[0])


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Pads tensors to the largest size that any rank has along `dim`, so that they can be gathered. Collective.

    Args:
        tensor: nested lists, tuples and mappings of tensors that differ along `dim` only.
        dim: dimension to pad; a tensor that does not have it stays as it is.
        pad_index: value of the padding.
        pad_first: pad at the beginning instead of the end.

    Raises:
        DistributedError: on every rank, if structures or numbers of dimensions differ.
        ConfigTypeError: on every rank, if a leaf is no tensor.
    """
    state = PartialState()
    check_agreement("pad_across_processes", tensor, "give all ranks the same structure", ranks_only=True)
    if state.num_processes == 1:
        return tensor
    sizes = [_size_along(leaf, dim) for leaf in leaves(tensor)]
    if not sizes:
        return tensor
    largest = torch.tensor(sizes, device=state.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    remaining = iter(largest.tolist())
    return recursively_apply(lambda one: _pad_one(one, dim, next(remaining), pad_index, pad_first), tensor)


def _size_along(tensor: torch.Tensor, dim: int) -> int:
    """Size along `dim`; -1 for a tensor that is not padded."""
    if tensor.is_nested:
        warnings.warn(
            "a nested tensor is left unpadded: turn it into a padded one before",
            CannotPadNestedTensorWarning,
            stacklevel=3,
        )
        return -1
    return tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else -1


def _pad_one(tensor: torch.Tensor, dim: int, size: int, pad_index: int, pad_first: bool) -> torch.Tensor:
    if size < 0 or tensor.shape[dim] == size:
        return tensor
    padded_shape = list(tensor.shape)
    own = padded_shape[dim]
    padded_shape[dim] = size
    padded = tensor.new_full(padded_shape, pad_index)
    padded.narrow(dim, size - own if pad_first else 0, own).copy_(tensor)
    return padded


def check_agreement(operation: str, data: Any, remedy: str, ranks_only: bool = False) -> None:
    """Compares structure, shapes and dtypes over the ranks.

    Args:
        operation: name for the error.
        data: what the operation was given.
        remedy: what the error advises.
        ranks_only: compare the numbers of dimensions instead of shapes and dtypes.

    Raises:
        DistributedError: on every rank, if they differ or the ranks call different operations; a rank did not come.
        ConfigTypeError: on every rank, if a leaf is no tensor.
    """
    state = PartialState()
    if state.num_processes > 1:
        meet(state, operation, _outline(data, ranks_only), remedy)
    others = sorted({type(leaf).__name__ for leaf in leaves(data) if not isinstance(leaf, torch.Tensor)})
    if others:
        raise ConfigTypeError(
            f"{operation} takes nested lists, tuples and mappings of tensors, but got {', '.join(others)}:"
            " use `gather_object` or `broadcast_object_list` for objects"
        )


def _outline(data: Any, ranks_only: bool) -> str:
    """Containers, keys in their order, and shapes, as text."""
    if isinstance(data, Mapping):
        return "{" + ", ".join(f"{key!r}: {_outline(value, ranks_only)}" for key, value in data.items()) + "}"
    if isinstance(data, (list, tuple)):
        return "(" + ", ".join(_outline(value, ranks_only) for value in data) + ")"
    if not isinstance(data, torch.Tensor):
        return type(data).__name__
    if data.is_nested:
        return "nested tensor"
    return f"{data.ndim} dimensions" if ranks_only else f"{list(data.shape)} {data.dtype}"
