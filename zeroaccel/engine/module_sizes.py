"""Sizes of a model's modules in bytes, and of its largest layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from zeroaccel.engine.modules import dtype_byte_size, named_module_tensors


def compute_module_sizes(
    model: torch.nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of every module and tensor by full name; the model's own name is "". A shared tensor counts once.

    Args:
        model: the model.
        dtype: what floating-point tensors would be cast to, where that makes them smaller.
        special_dtypes: another dtype for the tensors of these names.
        buffers_only: leave parameters out.
    """
    special = {name: dtype_byte_size(_dtype(kind)) for name, kind in (special_dtypes or {}).items()}
    sizes: dict[str, int] = defaultdict(int)
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    for name, tensor in tensors:
        width = dtype_byte_size(tensor.dtype)
        if name in special:
            width = special[name]
        elif dtype is not None and tensor.is_floating_point():
            width = min(dtype_byte_size(_dtype(dtype)), width)
        parts = name.split(".")
        for length in range(len(parts) + 1):
            sizes[".".join(parts[:length])] += tensor.numel() * width  # type: ignore[assignment]
    return sizes


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    return found


def get_max_layer_size(
    modules: Sequence[tuple[str, Any]], module_sizes: Mapping[str, int], no_split_module_classes: Sequence[str]
) -> tuple[int, list[str]]:
    """Size of the largest layer, and the names of all layers of that size.

    Args:
        modules: names of modules and tensors, and they themselves.
        module_sizes: what `compute_module_sizes` gave.
        no_split_module_classes: names of classes that are one layer; every module without others in it is one, too.
    """
    layers = [name for name, module in modules for name in _layers(name, module, no_split_module_classes)]
    largest = max((module_sizes[name] for name in layers), default=0)
    return largest, [name for name in layers if largest and module_sizes[name] == largest]


def _layers(name: str, module: Any, whole: Sequence[str]) -> Iterator[str]:
    children = list(module.named_children()) if isinstance(module, torch.nn.Module) else []
    if not children or type(module).__name__ in whole:
        yield name
        return
    for child, inner in children:
        yield from _layers(f"{name}.{child}", inner, whole)


def calculate_maximum_sizes(model: torch.nn.Module) -> tuple[int, tuple[int, list[str]]]:
    """Bytes of a model, and those of its largest layer with the names of all layers of that size."""
    sizes = compute_module_sizes(model)
    top = [*model.named_parameters(recurse=False), *model.named_children(), *model.named_buffers(recurse=False)]
    whole = getattr(model, "_no_split_modules", None) or []
    return sizes[""], get_max_layer_size(top, sizes, list(whole))
