"""Floating-point inputs of a 16-bit model: one clear error for a mismatch, or a cast where it was asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zeroaccel.distributed.operations import recursively_apply
from zeroaccel.errors import UsageError

# PyTorch's words: "must have the same dtype", "expected scalar type", "Input type (float) and bias type ...".
SPEAKS_OF_DTYPES = re.compile(r"dtype|scalar type|[Ii]nput type|mixed d?type|data type|type [Ff]loat")


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
        except (RuntimeError, ValueError) as error:  # ValueError: recurrent layers
            named = {**_positional(engine.module, args), **kwargs}
            mismatched = [f"{name} ({found})" for name, found in _floats(named) if found != dtype]
            if not SPEAKS_OF_DTYPES.search(str(error)) or not mismatched:
                raise
            raise UsageError(
                f"the model computes in {dtype}, but got {', '.join(mismatched)}: cast the batch"
                f" (`batch.to({dtype})`), or pass DeepSpeedPlugin(cast_inputs=True). PyTorch said: {error}"
            ) from error

    engine.forward = guarded


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


def _positional(module: torch.nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in by_position]
    names += [f"input {position}" for position in range(len(names), len(args))]
    return dict(zip(names, args, strict=False))


def _floats(named: Mapping[str, Any]) -> Iterator[tuple[str, torch.dtype]]:
    waiting = list(named.items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield name, value.dtype
        elif isinstance(value, Mapping):
            waiting += [(f"{name}[{key!r}]", inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{name}[{position}]", inner) for position, inner in enumerate(value)]
