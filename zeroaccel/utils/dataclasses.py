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
            "BaseEnum",
            "ComputeEnvironment",
            "CustomDtype",
            "DDPCommunicationHookType",
            "DistributedType",
            "DynamoBackend",
            "EnumWithContains",
            "FP8BackendType",
            "LoggerType",
            "PrecisionType",
            "RNGType",
            "SageMakerDistributedType",
        ],
        "zeroaccel.distributed.nested": [
            "TensorInformation",
        ],
        "zeroaccel.refused": [
            "AORecipeKwargs",
            "BnbQuantizationConfig",
            "DeepSpeedSequenceParallelConfig",
            "FP8RecipeKwargs",
            "FullyShardedDataParallelPlugin",
            "MSAMPRecipeKwargs",
            "MegatronLMPlugin",
            "TERecipeKwargs",
            "TorchContextParallelConfig",
            "TorchTensorParallelConfig",
            "TorchTensorParallelPlugin",
            "add_model_config_to_megatron_parser",
            "get_module_class_from_name",
            "parse_bert_config",
            "parse_glm4_moe_config",
            "parse_gpt2_config",
            "parse_llama_config",
            "parse_t5_config",
        ],
    },
)
