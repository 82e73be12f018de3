"""Models whose weights are born somewhere else: on another device, or, on "meta", nowhere yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeroaccel.config import environment


@contextmanager
def init_on_device(device: torch.device | str, include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules that are made have their parameters on `device`.

    Args:
        device: such as `torch.device("cuda")`.
        include_buffers: their buffers too; default: what `ZEROACCEL_INIT_INCLUDE_BUFFERS` says, else no.
    """
    if environment.flag("INIT_INCLUDE_BUFFERS") if include_buffers is None else include_buffers:
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
    kind: Any = type(parameter)
    # Quantized kinds are made from their attributes; private ones are marks of libraries.
    options = {} if kind is torch.nn.Parameter else {k: v for k, v in vars(parameter).items() if not k.startswith("_")}
    moved: torch.nn.Parameter = kind(parameter.to(device), **(options | {"requires_grad": parameter.requires_grad}))
    vars(moved).update(vars(parameter))
    return moved


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules are made with parameters that have a shape and no memory ("meta").

    Such a model tells its size, or gets weights by `load_state_dict(..., assign=True)`. To train a model bigger than a
    device, make it inside `accelerator.zero_init()` instead: there its weights are real, each rank has its share.

    Args:
        include_buffers: buffers too; default: what `ZEROACCEL_INIT_INCLUDE_BUFFERS` says, else no.
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


def remove_hook_from_module(module: torch.nn.Module, recurse: bool = False) -> torch.nn.Module:
    """Takes away the hook that Accelerate attached for a `device_map`, if there is one; returns the module.

    Args:
        module: of any kind.
        recurse: from its submodules, too.
    """
    for each in module.modules() if recurse else [module]:
        attributes: dict[str, Any] = vars(each)
        if hook := attributes.pop("_hf_hook", None):
            hook.detach_hook(each)
        if "_old_forward" in attributes:
            attributes["forward"] = attributes.pop("_old_forward")
    return module


def remove_hook_from_submodules(module: torch.nn.Module) -> None:
    """The same for a module and everything in it."""
    remove_hook_from_module(module, recurse=True)


def has_offloaded_params(module: torch.nn.Module) -> bool:
    """Whether a hook of Accelerate's, such as transformers' `device_map` attaches, keeps the parameters elsewhere."""
    return getattr(getattr(module, "_hf_hook", None), "offload", False) is True
