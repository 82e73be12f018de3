"""Batches that hold more than tensors: joined and cut along their samples.

A list or tuple without any tensor in it that is as long as the batch is a column: it has one object a sample, as
`default_collate` makes it of texts. Everything else in a batch that is no tensor belongs to the batch as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeroaccel.distributed.nested import (
    honor_type,
    ignorant_find_batch_size,
    is_torch_tensor,
    leaves,
    like_mapping,
    recursively_apply,
)
from zeroaccel.errors import ConfigError


def batch_size_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor, without any the length of its first column.

    Raises:
        ConfigError: it has neither.
    """
    size = ignorant_find_batch_size(batch)
    column = _first_column(batch) if size is None else None
    if size is None and column is None:
        raise ConfigError(
            f"a batch of type {type(batch).__name__} holds neither a tensor with a dimension nor a list, so it cannot"
            " be cut for the ranks: let collate_fn return one, or use dispatch_batches=False"
        )
    return len(column) if column is not None else int(size or 0)


def _first_column(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((found for value in batch.values() if (found := _first_column(value)) is not None), None)
    return batch if isinstance(batch, (list, tuple)) else None


def _is_column(value: Any, size: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == size and not any(map(is_torch_tensor, leaves(value)))


def join(batches: Sequence[Any]) -> Any:
    """Several batches as one.

    Raises:
        ConfigError: they are built differently, or something that belongs to a batch as a whole differs.
        RuntimeError: tensors of different shapes.
    """
    return batches[0] if len(batches) == 1 else _join(batches, [batch_size_of(batch) for batch in batches])


def _join(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if all(map(_is_column, parts, sizes)):
        return honor_type(first, [value for part in parts for value in part])
    if isinstance(first, Mapping) and all(isinstance(part, Mapping) and part.keys() == first.keys() for part in parts):
        return like_mapping(first, {key: _join([part[key] for part in parts], sizes) for key in first})
    if isinstance(first, (list, tuple)) and all(len(part) == len(first) for part in parts):
        return honor_type(first, [_join(each, sizes) for each in zip(*parts, strict=True)])
    if all(type(part) is type(first) and part == first for part in parts):
        return first
    raise ConfigError(
        f"batches with different parts of type {type(first).__name__} cannot be joined for the ranks: let collate_fn"
        " give one object a sample, as a list, or use split_batches=True or dispatch_batches=False"
    )


def cut(batch: Any, part: slice, process_index: int | None = None, num_processes: int | None = None) -> Any:
    """Samples `part` of a batch; what belongs to the batch as a whole stays.

    Args:
        batch: tensors and columns in nested lists, tuples and mappings.
        part: which samples.
        process_index, num_processes: not used here; functions given as `slice_fn_for_dispatch` get them.
    """
    return _cut(batch, part, batch_size_of(batch))


def _cut(value: Any, part: slice, size: int) -> Any:
    if _is_column(value, size):
        return honor_type(value, value[part])
    if isinstance(value, Mapping):
        return like_mapping(value, {key: _cut(each, part, size) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return honor_type(value, [_cut(each, part, size) for each in value])
    return recursively_apply(lambda tensor: tensor[part], value)
