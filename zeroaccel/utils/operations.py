"""Nested tensors and collectives, as in `accelerate.utils.operations`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.distributed.operations": [
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
        ],
        "zeroaccel.engine.zero3": [
            "GatheredParameters",
        ],
        "zeroaccel.refused": [
            "gather_tensor_shape",
        ],
    },
)
