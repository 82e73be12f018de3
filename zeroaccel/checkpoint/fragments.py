"""The tensors of a checkpoint: every rank writes the fragments that it has; who loads copies what overlaps.

A fragment is a run of elements of one parameter's weight, of one of its optimizer states, or of a buffer. It stands in
a safetensors file as a flat tensor named `kind/parameter@start`, e.g. `optimizer.exp_avg/first.weight@1024`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from zeroaccel.checkpoint.tensor_file import DTYPE_NAMES, Layout, TensorFile, mapped
from zeroaccel.engine.masters import STATE, Ownership, Shard, Share
from zeroaccel.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def file_name(model: int, rank: int) -> str:
    """File of one rank's fragments of a model."""
    return f"model_{model}.rank_{rank:05}.safetensors"


class _ChecksummedFile(TensorFile):
    """A tensor file that computes its CRC-32 as it is written."""

    crc32 = 0
    size = 0

    def _put(self, data: memoryview) -> None:
        super()._put(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)


@dataclass(frozen=True)
class _Piece:
    """A fragment on its way into a file."""

    layout: Layout
    shard: Shard
    kind: str
    offset: int


def _pieces(shard: Shard, left_out: Collection[str], rank: int, world_size: int) -> Iterator[_Piece]:
    """What this rank writes of a shard."""
    if shard.ownership is Ownership.FIRST and rank > 0:
        return
    dtypes = {shard.kind: shard.dtype} | {STATE + name: dtype for name, dtype in shard.state_dtypes().items()}
    for kind, dtype in dtypes.items():
        for part in shard.slices:
            share = -(-part.count // world_size) if shard.ownership is Ownership.SHARED else part.count
            skipped = min(part.count, share * rank) if shard.ownership is Ownership.SHARED else 0
            count = min(share, part.count - skipped)
            if count > 0 and part.name not in left_out:
                name = f"{kind}/{part.name}@{part.start + skipped}"
                yield _Piece(Layout(name, dtype, (count,)), shard, kind, part.offset + skipped)


def write(
    path: str, share: Share, left_out: Collection[str], rank: int, world_size: int, progress: Callable[[int], object]
) -> tuple[int, int]:
    """Writes this rank's fragments of a model, one after the other, durably.

    Args:
        path: the file.
        share: what this rank has of the model.
        left_out: parameters that are not to be saved.
        rank, world_size: who of how many writes here.
        progress: is told the bytes done.

    Returns:
        Size in bytes and CRC-32 of the file.
    """
    found = [piece for shard in share.shards() for piece in _pieces(shard, left_out, rank, world_size)]
    # Wide dtypes first, so that every tensor begins at a multiple of its element size.
    found.sort(key=lambda piece: -piece.layout.dtype.itemsize)
    file = _ChecksummedFile(path, [piece.layout for piece in found])
    try:
        for shard, pieces in itertools.groupby(found, key=lambda piece: piece.shard):
            with shard.opened() as tensors:
                for piece in pieces:
                    file.write(tensors[piece.kind].narrow(0, piece.offset, piece.layout.shape[0]))
                    progress(piece.layout.nbytes)
        file.close()
    finally:
        file.abandon()
    return file.size, file.crc32


def nbytes(share: Share, left_out: Collection[str], rank: int, world_size: int) -> int:
    """What `write` will write, without the file's header."""
    return sum(p.layout.nbytes for shard in share.shards() for p in _pieces(shard, left_out, rank, world_size))


@dataclass(frozen=True)
class _Stored:
    """A fragment in a file."""

    path: str
    begin: int
    start: int
    count: int
    dtype: torch.dtype


class Fragments:
    """Reads a model's tensors from the files of all ranks.

    Args:
        paths: the files.

    Raises:
        CheckpointError: one of them is no safetensors file.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._stored: dict[str, list[_Stored]] = {}
        for path in paths:
            for key, one in _fragments_of(path):
                self._stored.setdefault(key, []).append(one)
        for found in self._stored.values():
            found.sort(key=lambda one: one.start)

    def kinds(self, name: str) -> set[str]:
        """What there is of a parameter or buffer: `weight`, `optimizer.exp_avg`, ..."""
        return {key.split("/", 1)[0] for key in self._stored if key.split("/", 1)[1] == name}

    def states(self) -> set[str]:
        """Names of all optimizer states."""
        return {key.split("/", 1)[0].removeprefix(STATE) for key in self._stored if key.startswith(STATE)}

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a tensor."""
        return f"{kind}/{name}" in self._stored

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Of the tensor in the files."""
        return self._stored[f"{kind}/{name}"][0].dtype

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Copies the elements from `start` on into a flat tensor of any dtype and device.

        Raises:
            CheckpointError: elements are missing.
        """
        position, end = start, start + into.numel()
        for one in self._stored.get(f"{kind}/{name}", ()):
            last = min(end, one.start + one.count)
            if position >= last or one.start > position:
                continue
            stored = mapped(one.path, one.begin, Layout(name, one.dtype, (one.count,)))
            source = stored[position - one.start : last - one.start]
            into.narrow(0, position - start, last - position).copy_(source)
            position = last
        if position < end:
            raise CheckpointError(f"the checkpoint lacks elements {position} to {end - 1} of {kind} of {name}")


def _fragments_of(path: str) -> Iterator[tuple[str, _Stored]]:
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read: {error}") from error
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        key, _, start = name.rpartition("@")
        count = math.prod(entry["shape"])
        begin = 8 + length + entry["data_offsets"][0]
        yield key, _Stored(path, begin, int(start), count, _DTYPES[entry["dtype"]])
