"""The plugins, options and enumerations of `accelerate.utils.dataclasses`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.options": [
            "AutocastKwargs",
            "DataLoaderConfiguration",
            "DistributedDataParallelKwargs",
            "GradScalerKwargs",
            "GradientAccumulationPlugin",
            "InitProcessGroupKwargs",
            "KwargsHandler",
            "ProfileKwargs",
            "ProjectConfiguration",
            "TorchDynamoPlugin",
        ],
        "zeroaccel.config.plugin": [
            "DeepSpeedPlugin",
        ],
        "zeroaccel.config.types": [
            "ComputeEnvironment",
            "DDPCommunicationHookType",
            "DistributedType",
            "DynamoBackend",
            "LoggerType",
            "PrecisionType",
            "RNGType",
        ],
        "zeroaccel.distributed.nested": [
            "TensorInformation",
        ],
    },
)
