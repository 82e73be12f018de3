"""A safetensors file that is written tensor after tensor, so that no tensor has to wait in memory for the others."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from zeroaccel.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 2**25  # bytes that leave a device, or are cast, at once


@dataclass(frozen=True)
class Layout:
    """What a file says of a tensor before its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(layouts: Iterable[Any]) -> list[Any]:
    """Wide dtypes first, so that every tensor begins at a multiple of its element size."""
    return sorted(layouts, key=lambda layout: -layout.dtype.itemsize)


class TensorFile:
    """Writes one file. `write` takes the data of all tensors in the order of `layouts`, in pieces of any length.

    Args:
        path: is overwritten.
        layouts: all tensors of the file, `in_file_order`.

    Raises:
        CheckpointError: a dtype that the format does not have.
        OSError: from every method.
    """

    def __init__(self, path: str, layouts: Sequence[Layout]) -> None:
        self._header, self.starts, self._size = _header(layouts)
        self._written = len(self._header)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `close`
        self._put(memoryview(self._header))

    def write(self, piece: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Appends a flat piece, cast to `dtype` if given."""
        length = max(1, _CHUNK // piece.dtype.itemsize)
        for start in range(0, piece.numel(), length):
            chunk = piece[start : start + length].to("cpu", dtype or piece.dtype).contiguous()
            data = chunk.view(torch.uint8).numpy().data
            self._put(data)
            self._written += len(data)

    def _put(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])

    def close(self) -> None:
        """Has the data on the disk when it returns.

        Raises:
            CheckpointError: less or more was written than the header says.
        """
        with self._file as file:
            if self._written != self._size:
                raise CheckpointError(f"{file.name}: {self._written} bytes were written instead of {self._size}")
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._file.close()


def _header(layouts: Sequence[Layout]) -> tuple[bytes, dict[str, int], int]:
    """The file's beginning, where each tensor starts in the file, and the file's size."""
    if lacking := [f"{layout.name} ({layout.dtype})" for layout in layouts if layout.dtype not in DTYPE_NAMES]:
        raise CheckpointError(f"safetensors has no such dtype: {', '.join(lacking)}; use safe_serialization=False")
    # transformers and Accelerate refuse a file that does not name its framework.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for layout in layouts:
        offsets[layout.name], end = end, end + layout.nbytes
        entries[layout.name] = {
            "dtype": DTYPE_NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [offsets[layout.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: begin + offset for name, offset in offsets.items()}, begin + end


def mapped(path: str, start: int, layout: Layout) -> torch.Tensor:
    """A tensor of a file in a storage of its own, whose pages are read when needed and can be dropped again."""
    if layout.nbytes == 0:
        return torch.empty(layout.shape, dtype=layout.dtype)
    # "c": writable as PyTorch demands, but nothing that is written reaches the file.
    data = numpy.memmap(path, dtype=numpy.uint8, mode="c", offset=start, shape=(layout.nbytes,))
    return torch.from_numpy(data).view(layout.dtype).view(layout.shape)
