"""Models born partitioned at stage 3: `accelerator.zero_init()`.

A module's parameters are split when it is attached to its parent (PyTorch's registration hooks say so), what is left at
the end of the block. A constructor may look back at children that are split already, as `nn.Transformer` does: inside
the block such a parameter acts whole. Its shape is the logical one, and who reads or changes its value has it gathered,
on the device and in the dtype of its birth; it is split again, as rank 0 has it, at the end of the block at the latest.
So a model gets the weights that it would have without the block.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from zeroaccel.engine import ops, placeholders, zero_init
from zeroaccel.engine.shards import as_on_first_rank, is_here, is_split, logical_shape
from zeroaccel.errors import UsageError
from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet

# Elements of parameters that were looked back at and may be whole at a time; beyond, the oldest is split again.
_WHOLE_AT_A_TIME = 2**28

_REMEDY = "build the same model on all ranks, and look at its weights on all of them"
_tensor: Any = torch.Tensor
_SHAPES: dict[Any, Any] = {
    _tensor.shape.__get__: lambda shape: shape,
    _tensor.ndim.__get__: len,
    _tensor.dim: len,
    _tensor.ndimension: len,
    _tensor.numel: torch.Size.numel,
    _tensor.nelement: torch.Size.numel,
    torch.numel: torch.Size.numel,
}
# What neither needs nor changes a value.
_GETTERS = (
    *("_backward_hooks", "_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta"),
    *("is_quantized", "is_sparse", "layout", "requires_grad"),
)
_METHODS = (
    *("__hash__", "detach", "element_size", "get_device", "is_complex", "is_floating_point", "register_hook"),
    *("register_post_accumulate_grad_hook", "requires_grad_"),
)
_UNCONCERNED: set[Any] = {
    *(getattr(_tensor, name).__get__ for name in _GETTERS),
    *(getattr(_tensor, name).__set__ for name in ("_backward_hooks", "grad", "requires_grad")),
    *(getattr(_tensor, name) for name in _METHODS),
    *(torch.is_complex, torch.is_floating_point),
}

_current: _Birth | None = None


@contextmanager
def partitioned(config: dict[str, Any]) -> Iterator[None]:
    """Models that are built inside are split over the ranks. Collective.

    Args:
        config: of DeepSpeed, with the numbers that it asks for.

    Raises:
        DistributedError: on all ranks, where they build different models.
    """
    global _current
    if _current is not None:
        with _current.paused(False):
            yield
        return
    ops.build(ops.needed(config))
    zero_init.mend()
    _current = birth = _Birth(config)
    try:
        with birth.listening():
            yield
            birth.finish()
    finally:
        _current = None


@contextmanager
def suspended() -> Iterator[None]:
    """Inside the block models are built whole, within `partitioned` too, and split parameters show themselves so."""
    if _current is None:
        yield
        return
    _current.settle_all()
    with _current.paused(True):
        yield


class _Init(Init):  # type: ignore[misc]
    """DeepSpeed's, of which only the splitting is used: its context, which replaces constructors, is not entered."""

    birth: _Birth | None = None

    def _all_gather(self, param_list: list[Any], *arguments: Any, **options: Any) -> Any:
        if self.birth is not None:
            self.birth.settle(param_list)
        with torch._C.DisableTorchFunction():
            return super()._all_gather(param_list, *arguments, **options)

    def _partition(self, *arguments: Any, **options: Any) -> None:
        with torch._C.DisableTorchFunction():
            super()._partition(*arguments, **options)


class _Birth(TorchFunctionMode):
    """What has been built inside one block.

    Args:
        config: of DeepSpeed.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._config = config
        self._state = PartialState()
        self._paused = False
        self._modules: weakref.WeakKeyDictionary[torch.nn.Module, None] = weakref.WeakKeyDictionary()  # in order
        self._born: dict[int, tuple[torch.device, torch.dtype]] = {}
        self._whole: dict[int, Any] = {}  # looked back at, oldest first
        self._assigned: dict[int, Any] = {}  # whose data was replaced

    @cached_property
    def _init(self) -> _Init:
        """What splits parameters, made for the first one: for NVMe it takes buffers of some GiB."""
        init = _Init(config_dict_or_path=self._config)
        init.birth = self
        if init.mem_efficient_linear:
            init._enable_mem_efficient_linear()
        return init

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Splits what is attached inside the block, and has split parameters act whole there."""
        with ExitStack() as stack:
            stack.callback(register_module_module_registration_hook(self._attached).remove)
            stack.callback(register_module_parameter_registration_hook(self._registered).remove)
            stack.callback(self._let_go)
            stack.enter_context(placeholders.fetching(self.fetch))
            stack.enter_context(self)
            yield

    def _let_go(self) -> None:
        if "_init" in self.__dict__:
            self._init.birth = None

    @contextmanager
    def paused(self, value: bool) -> Iterator[None]:
        """Whether models are built whole inside the block."""
        before, self._paused = self._paused, value
        try:
            yield
        finally:
            self._paused = before

    # --- splitting ----------------------------------------------------------------------------------------------

    def _registered(self, module: torch.nn.Module, name: str, parameter: Any) -> None:
        if self._paused:
            return
        self._modules[module] = None
        if parameter is not None and not is_split(parameter) and tuple(parameter.shape) == (0,):
            raise UsageError(
                f"{type(module).__name__}.{name} is empty: torch.nn.Parameter(weight) of a weight that zero_init() has"
                " split has no value. Assign the weight itself to tie the two, or torch.nn.Parameter(weight.clone())"
            )

    def _attached(self, module: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
        if self._paused:
            return
        self._modules[module] = None
        if child is not None:
            self._split_all(child)

    def _split_all(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if not is_split(parameter) and not parameter.is_meta:
                self._split(parameter)

    def _split(self, parameter: Any) -> None:
        with torch._C.DisableTorchFunction():
            self._meet(parameter.shape, parameter.dtype, "builds a parameter")
            self._born[id(parameter)] = parameter.device, parameter.dtype
            parameter.data = parameter.data.to(self._init.local_device).contiguous()
            self._init._zero_init_param(parameter)

    def finish(self) -> None:
        """Splits everything that is whole, and brings buffers to the device, where the engine expects them."""
        self.settle_all()
        gc.collect()  # so that all ranks have the same modules
        for module in list(self._modules):
            self._split_all(module)
            for buffer in module.buffers():
                if not buffer.is_meta:
                    buffer.data = buffer.data.to(self._state.device)

    # --- looking back -------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func in _UNCONCERNED:
            return func(*args, **kwargs)
        concerned = [value for value in _flat([*args, *kwargs.values()]) if self._is_away(value)]
        if not concerned:
            return func(*args, **kwargs)
        if func in _SHAPES:
            return _SHAPES[func](logical_shape(concerned[0]))
        if func is _tensor.size:
            shape = logical_shape(concerned[0])
            return shape[kwargs.get("dim", args[1] if len(args) > 1 else None)] if len(args) > 1 or kwargs else shape
        if func == _tensor.data.__set__ and concerned[0] is args[0]:
            self._assigned[id(args[0])] = args[0]
            concerned = concerned[1:]
        for parameter in concerned:
            self.fetch(parameter)
        self._split_oldest(keep=concerned)
        return func(*args, **kwargs)

    def _is_away(self, value: Any) -> bool:
        return id(value) in self._born and id(value) not in self._assigned and not is_here(value)

    def fetch(self, parameter: Any) -> None:
        """Makes a parameter whole that this block has split; collective."""
        if not self._is_away(parameter):
            return
        device, dtype = self._born[id(parameter)]
        self._meet(logical_shape(parameter), dtype, "looks at a parameter")
        parameter.all_gather()
        with torch._C.DisableTorchFunction():
            parameter.data = parameter.data.to(device, dtype)
        self._whole[id(parameter)] = parameter

    def _split_oldest(self, keep: list[Any]) -> None:
        kept = {id(parameter) for parameter in keep}
        size = sum(logical_shape(parameter).numel() for parameter in self._whole.values())
        for parameter in list(self._whole.values()):
            if size <= _WHOLE_AT_A_TIME:
                return
            if id(parameter) not in kept:
                self.settle([parameter])
                size -= logical_shape(parameter).numel()

    def settle_all(self) -> None:
        """`settle` for all of them."""
        self.settle([*self._whole.values(), *self._assigned.values()])

    def settle(self, parameters: list[Any]) -> None:
        """Splits again what was looked back at, as it is now on rank 0."""
        with torch._C.DisableTorchFunction():
            for parameter in parameters:
                assigned = self._assigned.pop(id(parameter), None) is not None and parameter.numel() > 0
                fetched = self._whole.pop(id(parameter), None) is not None
                if fetched and parameter.shape == logical_shape(parameter):
                    self._split_again(parameter)
                elif fetched or assigned:
                    self._split(parameter)

    def _split_again(self, parameter: Any) -> None:
        parameter.data = parameter.data.to(self._init.local_device, parameter.ds_tensor.dtype).contiguous()
        as_on_first_rank(parameter, parameter.data)
        parameter.partition(has_been_updated=True)

    def _meet(self, shape: torch.Size, dtype: torch.dtype, what: str) -> None:
        meet(self._state, "zero_init", f"a rank {what} of shape {tuple(shape)}, {dtype}", _REMEDY)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
