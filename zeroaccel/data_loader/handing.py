"""Rank 0's batches on every rank."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from zeroaccel.data_loader.joint import END
from zeroaccel.distributed.collectives import broadcast_one
from zeroaccel.distributed.nested import get_data_structure, initialize_tensors, recursively_apply, send_to_device
from zeroaccel.errors import DistributedError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import attend


@dataclass(frozen=True)
class Failure:
    """Stands for the batch that rank 0 could not read."""

    problem: Exception

    def __str__(self) -> str:
        return f"{type(self.problem).__name__}: {self.problem}"


@dataclass(frozen=True)
class _Announcement:
    """What rank 0 says before a batch: how it is built, or that there is none.

    Attributes:
        structure: the batch with the shapes of tensors in their places.
        ended: there is no batch.
        problem: rank 0 could not read it.
    """

    structure: Any = None
    ended: bool = False
    problem: str = ""


class FromRank0:
    """One epoch's way of rank 0's batches to all ranks.

    Most batches are built as the one before: then a header of two numbers says so, and the tensors follow.

    Args:
        non_blocking: move batches to the device without waiting.
    """

    def __init__(self, non_blocking: bool) -> None:
        self._state = PartialState()
        self._non_blocking = non_blocking
        self._said = b""
        self._heard = _Announcement()

    def hand_out(self, batch: Any, last: bool) -> tuple[Any, bool]:
        """The batch on every rank, and whether it is the last. Collective.

        Args:
            batch: on rank 0 the batch, `END` or a `Failure`; ignored on the others.
            last: on rank 0, whether no other one follows.

        Raises:
            DistributedError: rank 0 could not read it, or cannot send it; rank 0 itself raises what it met.
        """
        if self._state.process_index == 0:
            batch, last = self._send(batch, last)
        else:
            batch, last = self._receive()
        if isinstance(batch, Failure):
            raise batch.problem
        return (END, True) if batch is END else (batch, last)

    def _send(self, batch: Any, last: bool) -> tuple[Any, bool]:
        if self._state.num_processes > 1:
            batch = self._announce(batch, last)
        if isinstance(batch, Failure) or batch is END:
            return batch, True
        batch = send_to_device(batch, self._state.device, non_blocking=self._non_blocking)
        return self._broadcast(batch) if self._state.num_processes > 1 else batch, last

    def _announce(self, batch: Any, last: bool) -> Any:
        batch, said = _put_into_words(batch)
        new = b"" if said == self._said else said
        self._said = said
        self._exchange_header(torch.tensor([len(new), last]))
        if new:
            dist.broadcast(torch.frombuffer(bytearray(new), dtype=torch.uint8).to(self._state.device), src=0)
        return batch

    def _receive(self) -> tuple[Any, bool]:
        size, last = self._exchange_header(torch.zeros(2, dtype=torch.int64))
        if size:
            room = torch.empty(size, dtype=torch.uint8, device=self._state.device)
            dist.broadcast(room, src=0)
            self._heard = pickle.loads(room.cpu().numpy().tobytes())
        if self._heard.problem:
            problem = f"rank 0, which reads for all ranks, could not read a batch: {self._heard.problem}"
            return Failure(DistributedError(problem)), True
        if self._heard.ended:
            return END, True
        return self._broadcast(initialize_tensors(self._heard.structure, self._state.device)), bool(last)

    def _exchange_header(self, header: torch.Tensor) -> list[int]:
        header = header.to(self._state.device)
        attend(self._state, "a dispatched loader's next batch", lambda: dist.broadcast(header, src=0, async_op=True))
        return header.tolist()

    @staticmethod
    def _broadcast(batch: Any) -> Any:
        return recursively_apply(lambda tensor: broadcast_one(tensor, 0), batch)


def _put_into_words(batch: Any) -> tuple[Any, bytes]:
    """The batch, or why it cannot be sent, and the bytes of its announcement."""
    if not isinstance(batch, Failure):
        try:
            structure = None if batch is END else get_data_structure(batch)
            return batch, pickle.dumps(_Announcement(structure, ended=batch is END))
        except Exception as error:
            reason = f"an object in it cannot be pickled, so it cannot be sent to the other ranks: {error}"
            batch = Failure(DistributedError(reason))
    return batch, pickle.dumps(_Announcement(problem=str(batch)))
