"""What starts a function on several ranks, as in `accelerate.utils.launch`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.launchers": [
            "PrepareForLaunch",
        ],
        "zeroaccel.refused": [
            "env_var_path_add",
            "prepare_deepspeed_cmd_env",
            "prepare_extend_env_parallelism_config",
            "prepare_multi_gpu_env",
            "prepare_sagemager_args_inputs",
            "prepare_simple_launcher_cmd_env",
            "prepare_tpu",
            "setup_fp8_env",
        ],
    },
)
