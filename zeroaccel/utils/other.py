"""What `accelerate.utils.other` has for scripts."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.checkpoint.files": [
            "TORCH_SAFE_GLOBALS",
            "clean_state_dict_for_safetensors",
            "load",
            "save",
        ],
        "zeroaccel.commands.config.default": [
            "write_basic_config",
        ],
        "zeroaccel.config.generic": [
            "convert_bytes",
            "get_pretty_name",
            "merge_dicts",
            "recursive_getattr",
        ],
        "zeroaccel.distributed.process": [
            "wait_for_everyone",
        ],
        "zeroaccel.engine.compilation": [
            "compile_regions",
            "compile_regions_deepspeed",
            "has_repeated_blocks",
            "is_repeated_blocks",
        ],
        "zeroaccel.engine.machine": [
            "check_os_kernel",
        ],
        "zeroaccel.engine.modules": [
            "get_module_children_bottom_up",
            "has_compiled_regions",
            "is_compiled_module",
            "model_has_dtensor",
        ],
        "zeroaccel.engine.unwrap": [
            "extract_model_from_parallel",
        ],
        "zeroaccel.launchers": [
            "get_free_port",
            "is_port_in_use",
        ],
        "zeroaccel.refused": [
            "compile_regions_fsdp2",
            "get_model_tp_size",
        ],
    },
)
