"""What a state dict shows of a parameter that stage 3 has split: name, shape and dtype, but no value.

DeepSpeed leaves an empty tensor in its place, which `torch.save` writes and `copy.deepcopy` copies without a word. Here
whoever asks such a tensor for its value gets an error that says what to write instead; names and shapes can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeroaccel.engine.shards import is_here, logical_shape
from zeroaccel.errors import UsageError

_INSTEAD = (
    "write accelerator.get_state_dict(model) on all ranks, accelerator.save_model(model, folder), or do it inside"
    " `with accelerator.gathered_parameters(model):`"
)

# What can be asked of a tensor without its value.
_GETTERS = (
    *("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse"),
    *("itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
)
_METHODS = (
    *(
        "__hash__",
        "__len__",
        "__repr__",
        "data_ptr",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
    ),
    *("is_floating_point", "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "untyped_storage"),
    # Without value as well; libraries look for tied weights by these, on ranks that save nothing, too.
    *("__getitem__", "contiguous", "detach", "reshape", "view"),
)
_ANSWERED: set[Any] = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(torch.is_complex, torch.is_floating_point, torch.numel),
}

_deepspeed_saves = False


class Placeholder(torch.Tensor):
    """Stands in a state dict for a parameter that stage 3 has split."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ANSWERED:
            raise UsageError(
                f"{getattr(func, '__name__', func)} asks for the value of a parameter that ZeRO stage 3 has split, of"
                f" which a state dict has only name and shape: {_INSTEAD}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            answer = func(*args, **(kwargs or {}))
        return answer.as_subclass(cls) if isinstance(answer, torch.Tensor) else answer


def guard(parameter: Any) -> None:
    """Has a split parameter's `detach()`, of which state dicts are made, and its deep copy know that it may be empty.

    Args:
        parameter: one that stage 3 has split.
    """
    kind = type(parameter)

    def detach() -> Any:
        if is_here(parameter) or _deepspeed_saves or not logical_shape(parameter).numel():
            return kind.detach(parameter)
        return torch.empty(logical_shape(parameter), dtype=parameter.dtype, device="meta").as_subclass(Placeholder)

    def deepcopy(memo: dict[int, Any]) -> Any:
        _fetch(parameter)
        if not is_here(parameter):
            raise UsageError(
                f"a parameter of shape {tuple(logical_shape(parameter))} that ZeRO stage 3 has split cannot be copied:"
                " each rank has a part of it. Copy the model inside `with accelerator.gathered_parameters(model):`"
            )
        return kind.__deepcopy__(parameter, memo)

    parameter.detach, parameter.__deepcopy__ = detach, deepcopy


def _nothing(parameter: Any) -> None:
    """Fetches nothing: outside of `zero_init()` a parameter is whole where somebody has gathered it."""


_fetch: Callable[[Any], None] = _nothing


@contextmanager
def fetching(fetch: Callable[[Any], None]) -> Iterator[None]:
    """Inside the block a copied parameter is made whole by `fetch` first."""
    global _fetch
    before, _fetch = _fetch, fetch
    try:
        yield
    finally:
        _fetch = before


@contextmanager
def as_deepspeed_knows_them() -> Iterator[None]:
    """Inside the block state dicts have DeepSpeed's empty tensors: its own checkpoints keep them beside the parts."""
    global _deepspeed_saves
    before, _deepspeed_saves = _deepspeed_saves, True
    try:
        yield
    finally:
        _deepspeed_saves = before
