"""Names of Accelerate that have no part in training with ZeRO.

They can be imported, so that a script with a branch for each strategy loads; using one is an error that says what to
write instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from zeroaccel.errors import UnsupportedError

_FSDP = (
    "weights are sharded by DeepSpeed here: DeepSpeedPlugin(zero_stage=3) does what FULL_SHARD does, 2 SHARD_GRAD_OP"
)
_MEGATRON = "Megatron-LM is another way to train: this library shards with DeepSpeedPlugin(zero_stage=1, 2 or 3)"
_PARALLELISM = "tensor, context, sequence and pipeline parallelism are not there: leave it out, ZeRO alone shards"
_BIG_MODELS = "a model bigger than a device is sharded over the ranks or offloaded at ZeRO stage 3: see docs/stage3.md"
_FP8 = "DeepSpeed trains in bf16, fp16 or fp32: mixed_precision='bf16'"
_QUANTIZATION = "a quantized model comes from transformers: from_pretrained(quantization_config=...)"
_SAGEMAKER = "SageMaker starts ranks by itself: run the script with `zeroaccel launch` inside of the job"
_XLA = "there is no DeepSpeed on TPUs"
_LAUNCHER = "the launcher is a command: `zeroaccel launch`, or notebook_launcher(function, args)"
_AFFINITY = "the launcher binds ranks to cores: `zeroaccel launch --enable_cpu_affinity`"
_GPU_QUIRKS = "nothing here depends on a driver's version"
_COLLECTIVES = "every collective compares shapes over the ranks, and needs no debug mode for it"
_PLAIN = "ask the object: accelerator.autocast(), accelerator.scaler"
_SAMPLES = "it reads files of Accelerate's repository"

_CLASSES = {
    _FSDP: "FullyShardedDataParallelPlugin",
    _MEGATRON: """AbstractTrainStep BertTrainStep GPTTrainStep MegatronLMDummyDataLoader MegatronLMDummyScheduler
        MegatronLMPlugin T5TrainStep""",
    _PARALLELISM: """DeepSpeedSequenceParallelConfig ParallelismConfig TorchContextParallelConfig
        TorchTensorParallelConfig TorchTensorParallelPlugin""",
    _BIG_MODELS: """AlignDevicesHook CpuOffload LayerwiseCastingHook ModelHook OffloadedWeightsLoader PrefixedDataset
        SequentialHook UserCpuOffloadHook""",
    _FP8: "AORecipeKwargs FP8RecipeKwargs MSAMPRecipeKwargs TERecipeKwargs",
    _QUANTIZATION: "BnbQuantizationConfig",
    _XLA: "ThreadLocalSharedDict",
}

_FUNCTIONS = {
    _FSDP: """compile_regions_fsdp2 disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading
        ensure_weights_retied fsdp2_apply_ac fsdp2_canonicalize_names fsdp2_load_full_state_dict fsdp2_prepare_model
        fsdp2_switch_optimizer_parameters get_fsdp2_grad_scaler get_module_class_from_name load_fsdp_model
        load_fsdp_optimizer merge_fsdp_weights save_fsdp_model save_fsdp_optimizer""",
    _MEGATRON: """add_model_config_to_megatron_parser avg_losses_across_data_parallel_group parse_bert_config
        parse_glm4_moe_config parse_gpt2_config parse_llama_config parse_t5_config""",
    _PARALLELISM: "get_model_tp_size prepare_pippy",
    _BIG_MODELS: """add_hook_to_module align_module_device attach_align_device_hook attach_align_device_hook_on_blocks
        attach_execution_device_hook attach_layerwise_casting_hooks check_device_map check_device_same
        check_tied_parameters_in_config check_tied_parameters_on_same_device clean_device_map
        compute_module_total_buffer_size cpu_offload cpu_offload_with_hook disk_offload dispatch_model
        extract_submodules_state_dict fallback_allocate get_balanced_memory get_max_memory get_module_leaves
        get_module_size_with_ties get_state_dict_from_offload get_state_dict_offloaded_model infer_auto_device_map
        load_checkpoint_and_dispatch load_offloaded_weight load_offloaded_weights offload_state_dict offload_weight
        save_offload_index set_module_tensor_to_device""",
    _FP8: """apply_fp8_autowrap contextual_fp8_autocast convert_model convert_model_to_fp8_ao
        filter_first_and_last_linear_layers has_ao_layers has_transformer_engine_layers setup_fp8_env""",
    _QUANTIZATION: "has_4bit_bnb_layers load_and_quantize_model",
    _SAGEMAKER: "prepare_sagemager_args_inputs",
    _XLA: "install_xla prepare_tpu",
    _LAUNCHER: """env_var_path_add prepare_deepspeed_cmd_env prepare_extend_env_parallelism_config prepare_multi_gpu_env
        prepare_simple_launcher_cmd_env""",
    _AFFINITY: "override_numa_affinity set_numa_affinity",
    _GPU_QUIRKS: "get_driver_version get_gpu_info",
    _COLLECTIVES: "gather_tensor_shape",
    _PLAIN: "get_grad_scaler get_mixed_precision_context_manager",
    _SAMPLES: "mocked_dataloaders mocked_dataloaders_for_autoregressive_models",
}

# Questions whether something can be used, to which the answer here is no.
_UNAVAILABLE = """is_bitsandbytes_multi_backend_available is_habana_gaudi1 is_megatron_lm_available is_pippy_available
    is_sagemaker_available is_transformer_engine_mxfp8_available"""


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in table.items() for name in names.split()}


CLASSES = _by_name(_CLASSES)
FUNCTIONS = _by_name(_FUNCTIONS)
UNAVAILABLE = _UNAVAILABLE.split()
NAMES = [*CLASSES, *FUNCTIONS, *UNAVAILABLE, "torchao_required"]


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        made: Any = type(name, (), {"__init__": _refusal(name, CLASSES[name]), "__doc__": f"Refused: {CLASSES[name]}."})
    elif name in FUNCTIONS:
        made = _refusal(name, FUNCTIONS[name])
    elif name in UNAVAILABLE:
        made = _never
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def torchao_required(func: Any) -> Any:
    """Decorator: the function is refused when it is called."""
    return _refusal(func.__name__, _FP8)


def _refusal(name: str, reason: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(f"{name} is not part of this library: {reason}")

    refuse.__doc__ = f"Refused: {reason}."
    return refuse


def _never(*args: Any, **kwargs: Any) -> bool:
    """No: this library does not use it."""
    return False
