"""Nested lists, tuples and mappings of tensors: visit, move, measure, cut and join. No rank is asked anything."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch

from zeroaccel.errors import ConfigError, ConfigTypeError


@dataclass
class TensorInformation:
    """What a rank must know to make room for a tensor of another one."""

    shape: torch.Size
    dtype: torch.dtype


def is_torch_tensor(tensor: Any) -> bool:
    """Whether this is a tensor."""
    return isinstance(tensor, torch.Tensor)


def is_tensor_information(tensor_info: Any) -> bool:
    """Whether this stands for a tensor that another rank holds."""
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    """Whether this is an instance of a `namedtuple` class."""
    return isinstance(data, tuple) and hasattr(data, "_asdict") and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """The values of `generator` as a list, tuple or namedtuple, whichever `obj` is."""
    return type(obj)(*generator) if is_namedtuple(obj) else type(obj)(generator)


def like_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """`items` as a mapping of the type that `original` has."""
    if type(original) is dict:
        return items
    if isinstance(original, defaultdict):
        return type(original)(original.default_factory, items)
    return type(original)(items)  # type: ignore[call-arg]


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Applies `func` to the leaves of a nested list, tuple or mapping; the containers keep their types.

    Args:
        func: called as `func(leaf, *args, **kwargs)`.
        data: nested containers, or one leaf.
        test_type: which leaves `func` is for; default: tensors.
        error_on_other_type: refuse other leaves instead of leaving them as they are.

    Raises:
        ConfigTypeError: a leaf of another type, with `error_on_other_type`.
    """
    if isinstance(data, (tuple, list, Mapping)):

        def deeper(value: Any) -> Any:
            return recursively_apply(
                func, value, *args, test_type=test_type, error_on_other_type=error_on_other_type, **kwargs
            )

        if isinstance(data, Mapping):
            return like_mapping(data, {key: deeper(value) for key, value in data.items()})
        return honor_type(data, (deeper(value) for value in data))
    if test_type(data):
        return func(data, *args, **kwargs)
    if error_on_other_type:
        name = getattr(func, "__name__", str(func))
        raise ConfigTypeError(
            f"{name} got a {type(data).__name__}, but takes only nested lists, tuples and mappings of leaves"
            f" that pass {getattr(test_type, '__name__', test_type)}: leave it out, or convert it before"
        )
    return data


def leaves(data: Any) -> Iterator[Any]:
    """Everything in nested lists, tuples and mappings that is none of these, depth first."""
    if isinstance(data, Mapping):
        data = data.values()
    elif not isinstance(data, (list, tuple)):
        yield data
        return
    for value in data:
        yield from leaves(value)


def get_shape(data: Any) -> Any:
    """The same nested structure with the shape of each tensor, as a list."""
    return recursively_apply(lambda tensor: list(tensor.shape), data)


def send_to_device(
    tensor: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | Sequence[str] | None = None,
) -> Any:
    """The same nested data on `device`.

    Args:
        tensor: nested lists, tuples and mappings; everything with a `to` method is moved, the rest stays.
        device: where to.
        non_blocking: return before the copy is done; helps for pinned memory.
        skip_keys: keys of mappings whose values stay where they are.
    """
    if isinstance(tensor, torch.Tensor) and tensor.device == device:
        return tensor  # much faster than to ask it
    if hasattr(tensor, "to"):
        try:
            return tensor.to(device, non_blocking=non_blocking)
        except TypeError:  # BatchEncoding and its like take the device only
            return tensor.to(device)
    if isinstance(tensor, (tuple, list)):
        return honor_type(tensor, (send_to_device(t, device, non_blocking, skip_keys) for t in tensor))
    if isinstance(tensor, Mapping):
        if not skip_keys:
            return like_mapping(tensor, {k: send_to_device(v, device, non_blocking) for k, v in tensor.items()})
        skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys
        moved = {
            key: value if key in skipped else send_to_device(value, device, non_blocking, skipped)
            for key, value in tensor.items()
        }
        return like_mapping(tensor, moved)
    return tensor


def get_data_structure(data: Any) -> Any:
    """The same nested data with a `TensorInformation` in the place of each tensor."""
    return recursively_apply(lambda tensor: TensorInformation(tensor.shape, tensor.dtype), data)


def initialize_tensors(data_structure: Any, device: torch.device | str | None = None) -> Any:
    """Uninitialized tensors in the place of each `TensorInformation`.

    Args:
        data_structure: what `get_data_structure` gave.
        device: where the tensors live; default: torch's default device.
    """
    return recursively_apply(
        lambda info: torch.empty(info.shape, dtype=info.dtype, device=device),
        data_structure,
        test_type=is_tensor_information,
    )


def find_batch_size(data: Any) -> int:
    """Size of the first dimension of the first tensor.

    Raises:
        ConfigError: there is no tensor (a TypeError too, unless `data` is empty), or the first has no dimension.
    """
    if isinstance(data, (tuple, list, Mapping)) and len(data) == 0:
        raise ConfigError(f"an empty {type(data).__name__} has no batch size")
    for leaf in leaves(data):
        if isinstance(leaf, torch.Tensor):
            if leaf.ndim == 0:
                raise ConfigError("a tensor without dimensions has no batch size: give it one, tensor[None]")
            return leaf.shape[0]
    raise ConfigTypeError(f"no tensor in this {type(data).__name__}, so the batch size is unknown")


def ignorant_find_batch_size(data: Any) -> int | None:
    """`find_batch_size`, or None where there is none."""
    try:
        return find_batch_size(data)
    except ConfigError:
        return None


def listify(data: Any) -> Any:
    """The same nested data with lists of numbers in the place of tensors."""
    return recursively_apply(lambda tensor: tensor.detach().cpu().tolist(), data)


def slice_tensors(
    data: Any,
    tensor_slice: slice,
    process_index: int | None = None,
    num_processes: int | None = None,
) -> Any:
    """`tensor[tensor_slice]` for each tensor.

    Args:
        data: nested lists, tuples and mappings of tensors.
        tensor_slice: part of the first dimension.
        process_index: not used here; functions given as `slice_fn_for_dispatch` get it.
        num_processes: as `process_index`.
    """
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: Sequence[Any], dim: int = 0) -> Any:
    """Joins nested data of one structure, tensor by tensor.

    Args:
        data: what to join, in order; a single element comes back as it is.
        dim: dimension along which to join.

    Raises:
        ConfigTypeError: a leaf is no tensor, and there is more than one to join.
    """
    first = data[0]
    if isinstance(first, (tuple, list)):
        return honor_type(first, (concatenate([d[i] for d in data], dim=dim) for i in range(len(first))))
    if isinstance(first, Mapping):
        return like_mapping(first, {key: concatenate([d[key] for d in data], dim=dim) for key in first})
    if isinstance(first, torch.Tensor):
        return torch.cat(list(data), dim=dim)
    if len(data) == 1:
        return first
    raise ConfigTypeError(f"only tensors can be concatenated, not {type(first).__name__}")


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Repeats the last element until `num_processes` divides the batch.

    Args:
        tensor: nested lists, tuples and mappings of tensors.
        batch_size: their size along `dim`.
        num_processes: what has to divide it.
        dim: dimension of the batch.
    """
    missing = -batch_size % num_processes

    def pad(one: torch.Tensor) -> torch.Tensor:
        last = one.narrow(dim, one.shape[dim] - 1, 1)
        return torch.cat([one] + [last] * missing, dim=dim)

    return recursively_apply(pad, tensor, error_on_other_type=True)


def find_device(data: Any) -> torch.device | None:
    """Device of the first tensor, None without any."""
    return next((leaf.device for leaf in leaves(data) if isinstance(leaf, torch.Tensor)), None)


def _is_half(tensor: Any) -> bool:
    return getattr(tensor, "dtype", None) in (torch.float16, torch.bfloat16)


def convert_to_fp32(tensor: Any) -> Any:
    """The same nested data with every fp16 and bf16 tensor in fp32."""
    return recursively_apply(lambda half: half.float(), tensor, test_type=_is_half)


class ConvertOutputsToFp32:
    """A forward function whose fp16 and bf16 outputs come as fp32."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))

    def __getstate__(self) -> Any:
        raise pickle.PicklingError(
            "a model prepared for mixed precision cannot be pickled: use `accelerator.unwrap_model(model)` before"
        )


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """`ConvertOutputsToFp32` as a plain function; `__wrapped__` leads back to `model_forward`."""
    converted = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return converted(*args, **kwargs)

    forward.__wrapped__ = converted  # type: ignore[attr-defined]
    return forward
