"""Regional compilation: the repeated blocks of a model are compiled one by one, so that all share one compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_repeated_blocks(module: nn.Module) -> bool:
    """Whether this is a ModuleList whose members are all of the first one's class, and that is not empty."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    return all(isinstance(member, type(module[0])) for member in module)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether there are repeated blocks within this module, or it is such a list itself."""
    return any(is_repeated_blocks(inner) for inner in module.modules())


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compiles each repeated block by itself, and so the layers beside the blocks; what holds them runs as it is.

    Args:
        module: stays as it is. Without repeated blocks it is compiled whole.
        compile_kwargs: of `torch.compile`.

    Returns:
        A module of the same class on the same parameters, buffers and hooks, whose `_orig_mod` is `module`.
    """
    if has_repeated_blocks(module):
        return _compiled_copy(module, compile_kwargs)
    return _compiled(module, compile_kwargs)


def compile_regions_deepspeed(module: nn.Module, **compile_kwargs: Any) -> None:
    """`compile_regions` in place, for a module whose engine holds it: names of parameters stay what they were.

    Args:
        module: the one within the engine.
        compile_kwargs: of `torch.compile`.
    """
    for region in _regions(module) if has_repeated_blocks(module) else [module]:
        region.compile(**compile_kwargs)


def _is_region(child: nn.Module, parent: nn.Module) -> bool:
    # A list or dictionary of modules is never called, and what torch.compile makes of it could not be indexed.
    if isinstance(child, _CONTAINERS):
        return False
    return is_repeated_blocks(parent) or not (has_repeated_blocks(child) or hasattr(child, "__getitem__"))


def _regions(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_region(child, module):
            yield child
        else:
            yield from _regions(child)


def _compiled(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    compiled: Any = torch.compile(module, **options)
    return compiled  # type: ignore[no-any-return]


def _compiled_copy(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if child is None:
            children[name] = None
        else:
            children[name] = (_compiled if _is_region(child, module) else _compiled_copy)(child, options)
    copied: nn.Module = object.__new__(type(module))
    attributes = {name: _rebound(value, module, copied) for name, value in vars(module).items()}
    vars(copied).update(attributes, _modules=children, _orig_mod=module)
    return copied


def _rebound(value: Any, module: nn.Module, copied: nn.Module) -> Any:
    """A method that was put on the instance, `forward` for one, would otherwise run the children of the original."""
    own = isinstance(value, MethodType) and value.__self__ is module
    return MethodType(value.__func__, copied) if own else value
