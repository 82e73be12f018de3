"""From what `prepare()` returned back to the user's own module."""

from __future__ import annotations

import sys
from typing import Any

import torch


def extract_model_from_parallel(
    model: torch.nn.Module,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> Any:
    """The user's module inside an engine, a data-parallel wrapper or a compiled module.

    Args:
        model: what `prepare()` returned, or a plain module, which comes back as it is.
        keep_fp32_wrapper: keep the autocast around `forward` that `prepare()` added without DeepSpeed.
        keep_torch_compile: return a compiled module compiled.
        recursive: also unwrap submodules.
    """
    compiled = model if isinstance(model, torch._dynamo.OptimizedModule) else None
    inner: Any = model._orig_mod if compiled is not None else model
    wrappers: Any = _wrappers()
    while isinstance(inner, wrappers):
        inner = inner.module
    if recursive:
        for name, child in inner.named_children():
            setattr(inner, name, extract_model_from_parallel(child, keep_fp32_wrapper, keep_torch_compile, True))
    if not keep_fp32_wrapper and "_original_forward" in inner.__dict__:
        inner.forward = inner.__dict__.pop("_original_forward")
    if compiled is not None and keep_torch_compile:
        compiled._orig_mod = inner
        return compiled
    return inner


def _wrappers() -> tuple[type, ...]:
    parallel: tuple[type, ...] = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    engine = sys.modules.get("deepspeed.runtime.engine")  # without DeepSpeed in use there is no engine to unwrap
    return parallel if engine is None else (*parallel, engine.DeepSpeedEngine)
