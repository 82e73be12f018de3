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
    },
)
