"""Memory: giving it back, and finding the batch size that fits."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from zeroaccel.errors import ConfigTypeError, EnvironmentProblem
from zeroaccel.state import best_device

# How the allocators of CUDA, ROCm, Intel, Apple, Gaudi and CPU devices say that there is no room, and cuDNN, which
# calls a lack of workspace "not supported".
_NO_ROOM = (
    " out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "DefaultCPUAllocator: can't allocate memory",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Gives memory that PyTorch keeps for reuse back to the device.

    Args:
        garbage_collection: collect unreachable objects before, which takes a while.
    """
    if garbage_collection:
        gc.collect()
    module = getattr(torch, best_device().type)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Collects garbage and gives memory back; `model, batch = release_memory(model, batch)` lets go of the objects.

    Returns:
        One None an object. Only with this assignment do the objects go.
    """
    clear_device_cache(garbage_collection=True)
    return [None] * len(objects)


def should_reduce_batch_size(exception: Exception) -> bool:
    """Whether the exception says that a batch did not fit into memory."""
    if not isinstance(exception, RuntimeError) or len(exception.args) != 1:
        return False
    return any(text in str(exception.args[0]) for text in _NO_ROOM)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Decorator: runs the function with smaller and smaller batches until one fits into memory.

    Each rank looks for itself: where one has less room than the others, they would part.

    Args:
        function: takes the batch size as its first parameter, which its caller leaves out.
        starting_batch_size: the first one to try. A later call starts with the one that was found.
        reduce_batch_size_fn: gives the next one; default: nine tenths, rounded down.

    Raises:
        EnvironmentProblem: not even a batch of one fits.
        ConfigTypeError: the function does not take the caller's arguments, e.g. a batch size of theirs.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    batch_size = starting_batch_size

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal batch_size
        _check_call(function, batch_size, *args, **kwargs)
        clear_device_cache(garbage_collection=True)
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            # Only here are the frames of the exception gone, and with them what they held.
            clear_device_cache(garbage_collection=True)
            batch_size = reduce_batch_size_fn() if reduce_batch_size_fn else batch_size * 9 // 10
        raise EnvironmentProblem(
            f"no batch size of {function.__name__} fits into memory, from {starting_batch_size} down to 1:"
            " use a smaller model, a higher ZeRO stage or offload"
        )

    return run


def _check_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigTypeError(
            f"{function.__name__} cannot be called like this ({error}): leave out its first parameter, the batch size,"
            " which find_executable_batch_size passes"
        ) from error
