"""Models whose weights are born somewhere else: on another device, or, on "meta", nowhere yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def init_on_device(device: torch.device | str, include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules that are made have their parameters on `device`.

    Args:
        device: such as `torch.device("cuda")`.
        include_buffers: their buffers too; default: no.
    """
    if include_buffers:
        with torch.device(device):
            yield
        return
    register = torch.nn.Module.register_parameter

    def register_there(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and param.device != torch.device(device):
            module._parameters[name] = _moved(param, device)

    torch.nn.Module.register_parameter = register_there  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _moved(parameter: torch.nn.Parameter, device: torch.device | str) -> torch.nn.Parameter:
    """The same kind of parameter there, with the attributes that were set on it."""
    attributes = dict(parameter.__dict__)
    kind: Any = type(parameter)
    if kind is torch.nn.Parameter:
        moved = torch.nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad)
        moved.__dict__.update(attributes)
        return moved
    return kind(parameter.to(device), **(attributes | {"requires_grad": parameter.requires_grad}))  # type: ignore[no-any-return]


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules are made with parameters that have a shape and no memory ("meta").

    Such a model tells its size, or gets weights by `load_state_dict(..., assign=True)`. To train a model bigger than a
    device, make it inside `accelerator.zero_init()` instead: there its weights are real, each rank has its share.

    Args:
        include_buffers: buffers too; default: no.
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


def has_offloaded_params(module: torch.nn.Module) -> bool:
    """Whether a hook of Accelerate's, such as transformers' `device_map` attaches, keeps the parameters elsewhere."""
    return getattr(getattr(module, "_hf_hook", None), "offload", False) is True
