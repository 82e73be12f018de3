"""Questions about modules and tensors, as in `accelerate.utils.modeling`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.checkpoint.load_weights": [
            "load_checkpoint_in_model",
            "load_state_dict",
        ],
        "zeroaccel.config.generic": [
            "convert_file_size_to_int",
        ],
        "zeroaccel.engine.module_sizes": [
            "calculate_maximum_sizes",
            "compute_module_sizes",
            "get_max_layer_size",
        ],
        "zeroaccel.engine.modules": [
            "dtype_byte_size",
            "find_tied_parameters",
            "get_non_persistent_buffers",
            "id_tensor_storage",
            "is_peft_model",
            "named_module_tensors",
            "retie_parameters",
        ],
        "zeroaccel.engine.placement": [
            "has_offloaded_params",
        ],
        "zeroaccel.refused": [
            "align_module_device",
            "check_device_map",
            "check_device_same",
            "check_tied_parameters_in_config",
            "check_tied_parameters_on_same_device",
            "clean_device_map",
            "compute_module_total_buffer_size",
            "fallback_allocate",
            "get_balanced_memory",
            "get_grad_scaler",
            "get_max_memory",
            "get_mixed_precision_context_manager",
            "get_module_leaves",
            "get_module_size_with_ties",
            "get_state_dict_from_offload",
            "get_state_dict_offloaded_model",
            "infer_auto_device_map",
            "load_offloaded_weights",
            "set_module_tensor_to_device",
        ],
    },
)
