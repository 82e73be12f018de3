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
        keep_torch_compile: return a compiled module, or one with compiled regions, compiled. DeepSpeed's engines
            compile a module in place, so it is compiled anyway.
        recursive: also unwrap submodules.
    """
    whole = isinstance(model, torch._dynamo.OptimizedModule)
    # Of what `compile_regions` made, too.
    inner: Any = _inside_wrappers(model._orig_mod if whole else vars(model).get("_orig_mod", model))
    compiled: Any = model if whole else _inside_wrappers(model)
    if recursive:
        for name, child in inner.named_children():
            setattr(inner, name, extract_model_from_parallel(child, keep_fp32_wrapper, keep_torch_compile, True))
    if not keep_fp32_wrapper:
        _call_directly(inner)
        _call_directly(compiled)
    if not keep_torch_compile:
        return inner
    if whole:
        compiled._orig_mod = inner
    return compiled


def _inside_wrappers(module: Any) -> Any:
    wrappers: Any = _wrappers()
    while isinstance(module, wrappers):
        module = module.module
    return module


def _call_directly(module: Any) -> None:
    """Takes off the autocast that `prepare()` put around `forward`."""
    if "_original_forward" in vars(module):
        module.forward = vars(module).pop("_original_forward")


def _wrappers() -> tuple[type, ...]:
    parallel: tuple[type, ...] = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    engine = sys.modules.get("deepspeed.runtime.engine")  # without DeepSpeed in use there is no engine to unwrap
    return parallel if engine is None else (*parallel, engine.DeepSpeedEngine)
