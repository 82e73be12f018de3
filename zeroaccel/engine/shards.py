"""A parameter's whole value, piece by piece, wherever ZeRO keeps it: only the ranks that want it ever get it.

Stage 3 cuts the flattened parameter into equal parts, one a rank, the last one padded. DeepSpeed's own gathering puts
the whole parameter on every rank, twice for a moment; here each part goes from its owner to who wants it, and can be
written to a file before the next one comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

from zeroaccel.errors import UnsupportedError


def is_split(tensor: Any) -> bool:
    """Whether stage 3 manages this parameter: its own data may be an empty placeholder."""
    return hasattr(tensor, "ds_id")


def logical_shape(tensor: Any) -> torch.Size:
    """Shape of a parameter's whole value, on every stage; `.numel()` of it is the number of elements.

    Args:
        tensor: a parameter or buffer; one that stage 3 has split shows an empty tensor of its own (`shape` is (0,)).
    """
    return torch.Size(tensor.ds_shape) if is_split(tensor) else tensor.shape


def is_here(tensor: Any) -> bool:
    """Whether this rank has the whole value by itself."""
    return not is_split(tensor) or tensor.ds_status.name == "AVAILABLE"


def refuse_expert_parallel(name: str, tensor: Any) -> None:
    """Refuses a parameter that has another value on another rank under the same name.

    Raises:
        UnsupportedError: it is an expert of DeepSpeed's MoE layer.
    """
    if getattr(tensor, "allreduce", True) is False:
        raise UnsupportedError(
            f"{name} is an expert of DeepSpeed's MoE layer, which ranks hold under one name: this library does not"
            " collect experts, use engine.save_checkpoint()"
        )


def pieces(tensor: Any, receivers: Sequence[int], here: bool) -> Iterator[torch.Tensor]:
    """The flattened value of a parameter in consecutive pieces, on the ranks that want it. Collective if not `here`.

    Args:
        tensor: a parameter or buffer.
        receivers: ranks that want the pieces; on the others nothing comes.
        here: whether the receivers have the whole value by themselves; all ranks must say the same.

    Raises:
        UnsupportedError: stage 3 keeps the weights quantized.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if here:
        if rank in receivers:
            yield tensor.detach().reshape(-1)
        return
    owners = torch.distributed.get_process_group_ranks(tensor.ds_process_group)
    part, size = tensor.partition_numel(), tensor.ds_numel
    for number, owner in enumerate(owners):
        length = min(part, size - number * part)
        if length <= 0:
            return
        if rank == owner:
            yield from _send(tensor, length, rank, [receiver for receiver in receivers if receiver != rank], receivers)
        elif rank in receivers:
            piece = torch.empty(length, dtype=tensor.dtype, device=_wire())
            torch.distributed.recv(piece.view(torch.uint8), src=owner)
            yield piece


def _wire() -> torch.device:
    """Where tensors must be to be sent: NCCL knows GPUs only."""
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _send(
    tensor: Any, length: int, rank: int, others: Sequence[int], receivers: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Sends this rank's own part, and gives it to this rank if it is a receiver."""
    if hasattr(tensor.ds_tensor, "ds_quant_scale"):
        raise UnsupportedError("weights that zero_quantized_nontrainable_weights keeps quantized cannot be collected")
    with own_part(tensor) as own:
        piece = own.narrow(0, 0, length)
        for receiver in others:
            torch.distributed.send(piece.to(_wire()).contiguous().view(torch.uint8), dst=receiver)
        if rank in receivers:
            yield piece


@contextmanager
def own_part(tensor: Any, write: bool = False) -> Iterator[torch.Tensor]:
    """This rank's part of a parameter that stage 3 has split, flat and padded, in memory as long as the block runs.

    Args:
        tensor: the parameter.
        write: keep what the block writes.
    """
    own = tensor.ds_tensor
    on_disk = own.status.name != "AVAILABLE"
    if on_disk:
        tensor.nvme_swapper.swap_in([tensor], async_op=False)
    yield own.detach().view(-1)
    if on_disk and write:
        tensor.nvme_swapper.swap_out_and_release([tensor])
    elif on_disk:
        tensor.nvme_swapper.remove_partition_and_release_buffers([tensor])


def as_on_first_rank(tensor: Any, value: torch.Tensor) -> None:
    """Gives all ranks what the first one has. Collective.

    Args:
        tensor: the parameter, which may have a process group of its own.
        value: its whole value, contiguous; is overwritten.
    """
    group = getattr(tensor, "ds_process_group", None)
    first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
    here = value.to(_wire())
    torch.distributed.broadcast(here.view(-1).view(torch.uint8), first, group=group)
    if here is not value:
        value.copy_(here)


def put(tensor: Any, value: torch.Tensor) -> None:
    """Gives a parameter that stage 3 has split a new value, of which each rank takes its part.

    Args:
        tensor: the parameter.
        value: whole, on every rank.
    """
    if tensor.ds_status.name == "AVAILABLE":
        tensor.data.copy_(value)
    part = tensor.partition_numel()
    start = part * torch.distributed.get_rank(tensor.ds_process_group)
    source = value.reshape(-1)[start : start + part]
    with own_part(tensor, write=True) as own:
        own.narrow(0, 0, source.numel()).copy_(source)
