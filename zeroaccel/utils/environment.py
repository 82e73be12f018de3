"""Environment variables and devices, as in `accelerate.utils.environment`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.env_patch": [
            "clear_environment",
            "convert_dict_to_env_variables",
            "get_int_from_env",
            "parse_choice_from_env",
            "parse_flag_from_env",
            "patch_environment",
            "purge_accelerate_environment",
            "purge_zeroaccel_environment",
            "str_to_bool",
        ],
        "zeroaccel.config.environment": [
            "CPUInformation",
            "get_cpu_distributed_information",
        ],
        "zeroaccel.config.packages": [
            "are_libraries_initialized",
        ],
        "zeroaccel.engine.machine": [
            "check_cuda_fp8_capability",
            "check_cuda_p2p_ib_support",
            "get_current_device_type",
        ],
        "zeroaccel.refused": [
            "get_driver_version",
            "get_gpu_info",
            "override_numa_affinity",
            "set_numa_affinity",
        ],
    },
)
