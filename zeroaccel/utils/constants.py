"""The constants of `accelerate.utils.constants`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.constants": [
            "CUDA_DISTRIBUTED_TYPES",
            "DEEPSPEED_MULTINODE_LAUNCHERS",
            "MODEL_NAME",
            "OPTIMIZER_NAME",
            "PROFILE_PATTERN_NAME",
            "RNG_STATE_NAME",
            "SAFE_MODEL_NAME",
            "SAFE_WEIGHTS_INDEX_NAME",
            "SAFE_WEIGHTS_NAME",
            "SAFE_WEIGHTS_PATTERN_NAME",
            "SAMPLER_NAME",
            "SCALER_NAME",
            "SCHEDULER_NAME",
            "TORCH_DISTRIBUTED_OPERATION_TYPES",
            "TORCH_DYNAMO_MODES",
            "WEIGHTS_INDEX_NAME",
            "WEIGHTS_NAME",
            "WEIGHTS_PATTERN_NAME",
        ],
        "zeroaccel.config.packages": [
            "STR_OPERATION_TO_FUNC",
        ],
    },
)
