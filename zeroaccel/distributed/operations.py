"""Everything that works on nested data and between ranks, under the names of `accelerate.utils.operations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from zeroaccel.distributed.collectives import (
    CannotPadNestedTensorWarning,
    broadcast,
    copy_tensor_to_devices,
    gather,
    pad_across_processes,
    reduce,
)
from zeroaccel.distributed.metrics import gather_for_metrics
from zeroaccel.distributed.nested import (
    ConvertOutputsToFp32,
    TensorInformation,
    concatenate,
    convert_outputs_to_fp32,
    convert_to_fp32,
    find_batch_size,
    find_device,
    get_data_structure,
    get_shape,
    honor_type,
    ignorant_find_batch_size,
    initialize_tensors,
    is_namedtuple,
    is_tensor_information,
    is_torch_tensor,
    listify,
    pad_input_tensors,
    recursively_apply,
    send_to_device,
    slice_tensors,
)
from zeroaccel.distributed.objects import broadcast_object_list, gather_object
from zeroaccel.errors import DistributedError

DistributedOperationException = DistributedError  # Accelerate's name

Function = TypeVar("Function", bound=Callable[..., Any])


def verify_operation(function: Function) -> Function:
    """Decorator of functions made of collectives, without effect: each compares shapes over the ranks by itself."""
    return function


chained_operation = verify_operation

__all__ = [
    "CannotPadNestedTensorWarning",
    "ConvertOutputsToFp32",
    "DistributedOperationException",
    "TensorInformation",
    "broadcast",
    "broadcast_object_list",
    "chained_operation",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_for_metrics",
    "gather_object",
    "get_data_structure",
    "get_shape",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
    "verify_operation",
]
