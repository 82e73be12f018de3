"""Values that `torch.load(weights_only=True)` reads: loading them runs no code.

State dicts of schedulers, loaders and registered objects become numbers, strings, tensors, lists, tuples, sets and
dictionaries of these. NumPy's arrays and numbers become tensors with a mark.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from zeroaccel.errors import CheckpointError, UsageError

_ARRAY = "zeroaccel.numpy"  # key of an array's tensor
_KEPT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def to_safe(value: Any, where: str) -> Any:
    """A value of these types only, with tensors on the CPU.

    Args:
        value: e.g. a state dict.
        where: what it belongs to, for the error.

    Raises:
        UsageError: something else is in it; names the place.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return _array_to_safe(numpy.asarray(value), where)
    if type(value) in _KEPT:
        return value
    if isinstance(value, (bool, int, float, str)):  # of a sub-class, an enum member of such a kind too
        return next(kind for kind in (bool, int, float, str) if isinstance(value, kind))(value)
    if isinstance(value, Mapping):
        items = {key: to_safe(item, f"{where}[{key!r}]") for key, item in value.items()}
        if any(type(key) not in _KEPT and type(key) is not tuple for key in items):
            raise UsageError(f"{where} has keys that are no numbers or strings, so it cannot be stored safely")
        if isinstance(value, Counter):  # MultiStepLR's milestones
            return Counter(items)
        return _ordered(value, items) if isinstance(value, OrderedDict) else items
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = [to_safe(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return inner if isinstance(value, list) else tuple(inner) if isinstance(value, tuple) else set(inner)
    raise UsageError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored so that loading it"
        " runs no code: let state_dict() give tensors, numbers, strings, lists and dictionaries, and load_state_dict()"
        " make the object again"
    )


def _ordered(value: Any, items: dict[Any, Any]) -> OrderedDict[Any, Any]:
    made = OrderedDict(items)
    if hasattr(value, "_metadata"):  # versions of the modules in a state dict
        made._metadata = OrderedDict(value._metadata)  # type: ignore[attr-defined]
    return made


def _array_to_safe(array: Any, where: str) -> dict[str, Any]:
    if array.dtype.kind not in "biufc":
        raise UsageError(f"{where} is a NumPy array of {array.dtype}, which cannot be stored safely: use a list")
    single = array.ndim == 0
    return {
        _ARRAY: torch.from_numpy(numpy.array(array, copy=True).reshape(-1)),
        "shape": None if single else array.shape,
    }


def from_safe(value: Any) -> Any:
    """What `to_safe` was given, with arrays for arrays."""
    if isinstance(value, dict) and not isinstance(value, Counter):
        if _ARRAY in value:
            array = value[_ARRAY].numpy()
            return array[0] if value["shape"] is None else array.reshape(value["shape"])
        items = {key: from_safe(item) for key, item in value.items()}
        return _ordered(value, items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple, set):
        return type(value)(from_safe(item) for item in value)
    return value


class _Checksummed:
    """A file that is written from one end to the other, and its CRC-32."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def write_safe(path: str, value: Any) -> tuple[int, int]:
    """Writes a value that `to_safe` gave, durably.

    Returns:
        Size in bytes and CRC-32 of the file.
    """
    with open(path, "wb") as file:
        checked = _Checksummed(file)
        torch.save(value, checked)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return checked.size, checked.crc32


def read_safe(path: str, **options: Any) -> Any:
    """What `write_safe` wrote.

    Args:
        path: the file.
        options: of `torch.load`; `weights_only` is always True.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return from_safe(torch.load(path, **{"map_location": "cpu", **options, "weights_only": True}))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
