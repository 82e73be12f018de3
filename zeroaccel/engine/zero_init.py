"""`deepspeed.zero.Init` without what it does to models and leaves behind in the process (DeepSpeed 0.19.8).

transformers enters it by itself, and so may the script, so it is mended in place, once, when a run on DeepSpeed begins.

- A parameter without dimensions fails in the broadcast at birth, and in that of `GatheredParameters`.
- Buffers are born in 16 bit, and weights are drawn in 16 bit, so they are others than those of a model that is built
  whole: what is built keeps its dtype, and parameters become 16 bit where they are split.
- `torch.nn.functional.linear` stays replaced for every model: it is for weights that stage 3 has split.
- `Module.__init_subclass__` stays replaced, so generic modules (`class Net(Module, Generic[T])`) break; so does
  `Module._apply` after `torch.nn.utils.skip_init`, and later `model.to()` splits whatever it moves.
- A second model with parameters on NVMe deletes the files of the first one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, GatheredParameters, Init

from zeroaccel.engine import placeholders
from zeroaccel.engine.shards import is_split

_HALF = (torch.float16, torch.bfloat16)
# Attributes that the context leaves on classes.
_LEFTOVERS = ("_old_init", "_old_init_subclass", "_old_apply", "_old_apply_of_skip_init_hook")
_mended = False


def mend() -> None:
    """Mends DeepSpeed's `zero.Init`; a second call does nothing."""
    global _mended
    if _mended:
        return
    _mended = True
    owner: Any = Init  # whose methods are replaced
    owner._zero_init_param = _splitting_anything(owner._zero_init_param)
    gathered: Any = GatheredParameters
    gathered._exit = _broadcasting_anything(gathered._exit)
    owner.unpatch_init_and_builtins = _leaving_nothing(owner.unpatch_init_and_builtins)
    DEFAULTS = partition_parameters.DEFAULT_TENSOR_OVERRIDES
    DEFAULTS[:] = [kind for kind in DEFAULTS if kind is not DeepSpeedTensorOverride.dtype]
    partition_parameters.zero3_linear_wrap = _linear(partition_parameters.zero3_linear_wrap, torch.nn.functional.linear)
    partition_parameters.AsyncPartitionedParameterSwapper = _in_folders_of_their_own(
        partition_parameters.AsyncPartitionedParameterSwapper
    )
    engine: Any = DeepSpeedEngine
    engine.save_checkpoint = _with_empty_tensors(engine.save_checkpoint)


def _splitting_anything(split: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def split_any(init: Any, parameter: Any) -> None:
        # Only where a model is born: of a whole model the engine knows which dtypes it wants.
        if init.module is None and init.dtype in _HALF and parameter.is_floating_point():
            parameter.data = parameter.data.to(init.dtype)
        scalar = parameter.dim() == 0
        if scalar:
            parameter.data = parameter.data.view(1)
        split(init, parameter)
        if scalar:
            parameter.ds_shape = torch.Size([])
        placeholders.guard(parameter)

    return split_any


def _broadcasting_anything(leave: Callable[..., Any]) -> Callable[..., Any]:
    def leave_any(gathered: Any, *exception: Any) -> Any:
        for parameter in gathered.params:
            if parameter.dim() == 0:
                parameter.data = parameter.data.view(1)
        return leave(gathered, *exception)

    return leave_any


def _linear(sparing: Callable[..., Any], ordinary: Callable[..., Any]) -> Callable[..., Any]:
    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """`torch.nn.functional.linear`; a weight that stage 3 has split is not kept for the backward pass."""
        return sparing(input, weight, bias) if is_split(weight) else ordinary(input, weight, bias)

    return linear


def _leaving_nothing(unpatch: Callable[[Any], None]) -> Callable[[Any], None]:
    def unpatch_all(init: Any) -> None:
        unpatch(init)
        classes = list(_with_subclasses(torch.nn.Module))
        for kind in classes:
            if "_old_apply_of_skip_init_hook" in kind.__dict__:
                kind._apply = kind._old_apply_of_skip_init_hook
            for name in _LEFTOVERS:
                if name in kind.__dict__:
                    delattr(kind, name)
        if "__init_subclass__" in torch.nn.Module.__dict__:  # PyTorch's has none
            del torch.nn.Module.__init_subclass__

    return unpatch_all


def _with_subclasses(kind: Any) -> Iterator[Any]:
    known = {kind}
    waiting = [kind]
    while waiting:
        yield (current := waiting.pop())
        new = set(current.__subclasses__()) - known
        known |= new
        waiting += new


def _in_folders_of_their_own(swapper: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count()

    def make(ds_config: Any, model_dtype: torch.dtype) -> Any:
        number, section = next(numbers), ds_config.zero_config.offload_param
        if number == 0:
            return swapper(ds_config, model_dtype)
        folder = os.path.join(section.nvme_path, f"model_{number}")
        ds_config.zero_config.offload_param = section.model_copy(update={"nvme_path": folder})
        try:
            return swapper(ds_config, model_dtype)
        finally:
            ds_config.zero_config.offload_param = section

    return make


def _with_empty_tensors(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(engine: Any, *arguments: Any, **options: Any) -> Any:
        with placeholders.as_deepspeed_knows_them():
            return save(engine, *arguments, **options)

    return save_checkpoint
