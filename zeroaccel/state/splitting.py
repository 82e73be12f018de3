"""A rank's share of inputs that every rank has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeroaccel.errors import ConfigError, ConfigTypeError


def share_of(inputs: Any, rank: int, world_size: int, apply_padding: bool = False) -> Any:
    """The part of `inputs` that rank `rank` works on: contiguous, sizes differ by one at most.

    Args:
        inputs: list, tuple, tensor, array, `datasets.Dataset`, or a mapping of these, all of one length. A text is not
            cut: every rank gets it.
        rank, world_size: whose share of how many.
        apply_padding: repeat the last element so that every rank gets equally many.

    Raises:
        ConfigError: the mapping's values have different lengths.
        ConfigTypeError: something without a length.
    """
    if isinstance(inputs, (str, bytes)):
        return inputs
    length = _common_length(inputs)
    each, extra = divmod(length, world_size)
    start = rank * each + min(rank, extra)
    indices = list(range(start, start + each + (rank < extra)))
    if apply_padding:
        indices += [length - 1] * (each + (extra > 0) - len(indices))
    return _take(inputs, indices)


def _common_length(inputs: Any) -> int:
    parts = inputs if isinstance(inputs, Mapping) else {"it": inputs}
    lengths = {key: _length(value) for key, value in parts.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"split_between_processes needs values of one length in a dict, got {lengths}")
    return next(iter(lengths.values()), 0)


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError as error:
        raise ConfigTypeError(
            f"split_between_processes cannot split a {type(value).__name__}, which has no length: pass a list, a tuple,"
            " a tensor, an array, a datasets.Dataset, or a dict of these"
        ) from error


def _take(values: Any, indices: list[int]) -> Any:
    if isinstance(values, Mapping):
        return type(values)({key: _take(value, indices) for key, value in values.items()})  # type: ignore[call-arg]
    if isinstance(values, (list, tuple)):
        return type(values)([values[index] for index in indices])
    if isinstance(values, Sequence):  # a range
        return [values[index] for index in indices]
    if hasattr(values, "select") and not isinstance(values, torch.Tensor):  # datasets.Dataset
        return values.select(indices)
    return values[indices]
