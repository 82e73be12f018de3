"""Floating-point inputs of a 16-bit model: one clear error for a mismatch, or a cast where it was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zeroaccel.distributed.operations import recursively_apply
from zeroaccel.errors import UsageError


def guard_inputs(engine: Any, dtype: torch.dtype, cast: bool) -> None:
    """Wraps the engine's forward.

    Args:
        engine: the engine whose parameters have `dtype`.
        dtype: what the model computes in.
        cast: cast floating-point inputs to it.
    """
    if dtype == torch.float32:
        return
    forward = engine.forward

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if cast:
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            mismatched = [f"{name} ({found})" for name, found in _floats(args, kwargs) if found != dtype]
            if "dtype" not in str(error) or not mismatched:
                raise
            raise UsageError(
                f"the model computes in {dtype}, but got {', '.join(mismatched)}: cast the batch"
                f" (`batch.to({dtype})`), or pass DeepSpeedPlugin(cast_inputs=True). PyTorch said: {error}"
            ) from error

    engine.forward = guarded


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


def _floats(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.dtype]]:
    named = [(f"input {position}", value) for position, value in enumerate(args)] + list(kwargs.items())
    while named:
        name, value = named.pop(0)
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield name, value.dtype
        elif isinstance(value, Mapping):
            named += [(f"{name}[{key!r}]", inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            named += [(f"{name}[{position}]", inner) for position, inner in enumerate(value)]
