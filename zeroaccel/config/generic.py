"""Small helpers on plain Python objects that scripts import."""

from __future__ import annotations

import functools
import re
from typing import Any

from zeroaccel.errors import ConfigError

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert_bytes(size: float) -> str:
    """A number of bytes in the largest unit that leaves it at 1 or more, e.g. "1.5 MB", of 1024 each."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def convert_file_size_to_int(size: int | str) -> int:
    """Bytes in a size such as "5GB" (10**9), "5GiB" (2**30) or "5Gb" (bits); an integer comes back as it is.

    Raises:
        ConfigError: another text, or less than nothing.
    """
    if isinstance(size, int) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([kmg]i?b)", str(size), flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"size {size!r} is unclear: write a number of bytes, or a text such as '5GB' or '512MiB'")
    number, unit = match.groups()
    count = int(float(number) * _UNITS[unit.upper()])
    return count // 8 if unit.endswith("b") and len(unit) == 2 else count


def merge_dicts(source: dict[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Writes `source` into `destination`, dictionaries within it key by key; returns `destination`."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def recursive_getattr(obj: Any, attr: str) -> Any:
    """`obj.a.b.c` for `attr="a.b.c"`."""
    return functools.reduce(getattr, attr.split("."), obj)


def get_pretty_name(obj: Any) -> str:
    """Name of a class or function; of any other object, its class's."""
    named = obj if hasattr(obj, "__qualname__") or hasattr(obj, "__name__") else type(obj)
    return str(getattr(named, "__qualname__", None) or named.__name__)
