"""Helpers on plain objects, against Accelerate's."""

from __future__ import annotations

from typing import Any

import accelerate.utils as theirs
import pytest

from zeroaccel.config import generic as ours
from zeroaccel.errors import ConfigError


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1536, 10**6, 2**30, 5 * 2**40, 2**50, 3 * 2**60, 0.5])
def test_bytes_are_written_in_the_unit_of_accelerate(size: float) -> None:
    assert ours.convert_bytes(size) == theirs.convert_bytes(size)


@pytest.mark.parametrize(
    "size", [0, 7, "1KB", "1kb", "2MB", "2Mb", "0.5GB", "3Gb", "4KiB", "4kib", "1.5MiB", "2GIB", ".5GiB", "10 MB"]
)
def test_sizes_are_read_as_accelerate_reads_them(size: int | str) -> None:
    assert ours.convert_file_size_to_int(size) == theirs.convert_file_size_to_int(size)


@pytest.mark.parametrize("size", ["", "12", "GB", "5XB", "-1GB", "1,5GB", -1])
def test_sizes_that_accelerate_refuses_are_refused_by_name(size: int | str) -> None:
    with pytest.raises(ValueError):
        theirs.convert_file_size_to_int(size)
    with pytest.raises(ConfigError, match=f"size {size!r} is unclear"):
        ours.convert_file_size_to_int(size)


def test_dictionaries_are_merged_key_by_key_into_the_second() -> None:
    destination: dict[str, Any] = {"a": {"x": 1, "y": {"deep": 1}}, "b": 2}
    merged = ours.merge_dicts({"a": {"y": {"more": 3}}, "b": 4, "c": {"new": 5}}, destination)
    assert merged is destination
    assert merged == {"a": {"x": 1, "y": {"deep": 1, "more": 3}}, "b": 4, "c": {"new": 5}}


def test_attributes_are_found_through_dots() -> None:
    assert ours.recursive_getattr(ours, "convert_bytes.__name__") == "convert_bytes"
    with pytest.raises(AttributeError, match="nothing"):
        ours.recursive_getattr(ours, "convert_bytes.nothing.more")


class _Named:
    def method(self) -> None: ...


@pytest.mark.parametrize("value", [_Named, _Named(), _Named.method, _Named().method, len, 3, pytest])
def test_names_are_those_of_accelerate(value: Any) -> None:
    assert ours.get_pretty_name(value) == theirs.get_pretty_name(value)
