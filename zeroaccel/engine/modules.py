"""Questions about a PyTorch module and its tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from zeroaccel.config.generic import recursive_getattr
from zeroaccel.engine.unwrap import extract_model_from_parallel


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Whether this is what `torch.compile` made of a module."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def has_compiled_regions(module: torch.nn.Module) -> bool:
    """Whether a module within this one is compiled, or it is so itself."""
    return any(is_compiled_module(inner) for inner in module.modules())


def is_peft_model(model: torch.nn.Module) -> bool:
    """Whether the user's module is one of the package peft."""
    peft = sys.modules.get("peft")  # a model of peft cannot exist before it is imported
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def model_has_dtensor(model: torch.nn.Module) -> bool:
    """Whether a parameter is a `DTensor`, as tensor parallelism makes them."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def get_module_children_bottom_up(model: torch.nn.Module, return_fqns: bool = False) -> list[Any]:
    """All modules of a model, each one after those that it contains; the last is the model.

    Args:
        model: the model.
        return_fqns: give pairs of full name and module.
    """
    named = list(model.named_modules(remove_duplicate=False))[::-1]
    return list(named) if return_fqns else [module for _, module in named]


def named_module_tensors(
    module: torch.nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a module: its parameters, then its buffers.

    Args:
        module: the module.
        include_buffers: False gives parameters only.
        recurse: those of the modules within it, too.
        remove_non_persistent: leave out buffers that are not saved.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        left_out = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
        yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=recurse) if name not in left_out)


def get_non_persistent_buffers(module: torch.nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Names of a module's buffers that are not saved.

    Args:
        module: the module.
        recurse: those of the modules within it, too.
        fqns: full names, as in the state dict.
    """
    owners = module.named_modules() if recurse else [("", module)]
    return {
        f"{path}.{name}" if fqns and path else name
        for path, owner in owners
        for name in owner._non_persistent_buffers_set
    }


def find_tied_parameters(model: torch.nn.Module, **kwargs: Any) -> list[list[str]]:
    """Groups of names that belong to one parameter; names within a group are sorted.

    Args:
        model: the model.
        kwargs: accepted and without effect, as in Accelerate.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [sorted(names) for names in groups.values() if len(names) > 1]


def retie_parameters(model: torch.nn.Module, tied_params: list[list[str]]) -> None:
    """Makes the parameters of each group one again, the first that is not on the meta device.

    Args:
        model: the model.
        tied_params: what `find_tied_parameters` gave before the ties were cut.
    """
    for names in tied_params:
        real = (parameter for name in names if (parameter := recursive_getattr(model, name)).device.type != "meta")
        shared = next(real, None)
        if shared is None:
            continue
        for name in names:
            path, _, last = name.rpartition(".")
            setattr(recursive_getattr(model, path) if path else model, last, shared)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device, address and size in bytes of a tensor's storage: equal for tensors that share it.

    All tensors of the meta device have the address 0.
    """
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def dtype_byte_size(dtype: torch.dtype) -> float:
    """Bytes of one element; 1/8 for bool, as it is counted in checkpoints."""
    return 1 / 8 if dtype == torch.bool else dtype.itemsize
