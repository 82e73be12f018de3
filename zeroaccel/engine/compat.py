"""What we need of DeepSpeed beyond its public interface, in one list, checked when the first engine is made."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from packaging.version import Version

from zeroaccel.errors import EnvironmentProblem

OLDEST, BEFORE = Version("0.19.8"), Version("0.20")
_SUPPORTED = f"install 'deepspeed>={OLDEST},<{BEFORE}'"

# module -> class ("" for the module itself) -> names in use
PRIVATE_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed.runtime.engine": {
        "": ("_ENGINE_BACKWARD_GRAPH_TRACKER",),
        "DeepSpeedEngine": (
            "_backward_prologue",
            "_backward_prologue_per_tensor",
            "_backward_epilogue",
            "_broadcast_model",
            "allreduce_gradients",
            "set_gradient_accumulation_boundary",
            "was_step_applied",
            "dynamic_loss_scale",
            "get_global_grad_norm",
            "is_gradient_accumulation_boundary",
            "initial_dynamic_scale",
            "zero_optimization_partition_gradients",
        ),
    },
    "deepspeed.runtime.base_optimizer": {
        "ZeROOptimizer": ("_backward_active_depth", "clear_backward_seen_flag"),
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        "": ("INITIAL_MICRO_STEP_ID",),
        "DeepSpeedZeroOptimizer": (
            "backward_epilogue",
            "initialize_optimizer_states",
            "finalize_gradient_accumulation_boundary",
            "get_param_gradient_attribute",
            "independent_gradient_partition_epilogue",
            "reduce_ready_partitions_and_remove_grads",
            "_fill_param_grad_accum_attribute",
            "get_param_id",
            "reset_cpu_buffers",
            "scaled_global_norm",
            "update_lp_params",
            "_lazy_init_hp_params_optimizer_state",
        ),
    },
    "deepspeed.runtime.zero.stage3": {
        "": ("combine_grad_norm_groups",),
        "DeepSpeedZeroOptimizer_Stage3": (
            "initialize_optimizer_states",
            "_get_fp32_grad_state_partition",
            "_get_norm_groups",
            "_get_param_partition_rank",
            "_optimizer_states_and_gradient_swap_in",
            "_optimizer_states_and_gradient_swap_out",
            "_reassign_or_swap_out_partitioned_parameters",
            "_release_swap_buffers",
            "_swappable_optimizer_subgroup",
            "_writeback_swap_state",
            "checkpoint_event_epilogue",
            "checkpoint_event_prologue",
            "finalize_gradient_accumulation_boundary",
            "get_fp32_grad_for_param",
            "get_full_hp_param",
            "get_local_fp32_grad_for_param",
            "get_local_fp32_param",
            "get_param_id",
            "independent_gradient_partition_epilogue",
            "partition_grads",
            "reduce_ready_partitions_and_remove_grads",
            "set_fp32_grad_for_param",
            "set_full_hp_param",
            "set_local_grad_for_param",
            "set_local_hp_param",
            "update_fp32_grad_for_param_vectorized",
        ),
    },
    "deepspeed.runtime.zero.parameter_offload": {"DeepSpeedZeRoOffload": ("release_backward_leftovers",)},
    "deepspeed.runtime.bf16_optimizer": {
        "BF16_Optimizer": ("get_grads_for_norm", "update_lp_params", "_lazy_init_hp_params_optimizer_state"),
    },
    "deepspeed.runtime.fp16.fused_optimizer": {"FP16_Optimizer": ("initialize_optimizer_states",)},
    "deepspeed.runtime.fp16.unfused_optimizer": {"FP16_UnfusedOptimizer": ("initialize_optimizer_states",)},
    "deepspeed.runtime.compiler": {"": ("lazy_disable",)},
    "deepspeed.runtime.zero.partitioned_param_coordinator": {
        "PartitionedParameterCoordinator": ("fetch_sub_module", "is_complete_trace", "reset_step"),
    },
    "deepspeed.runtime.zero.partition_parameters": {
        "": ("AsyncPartitionedParameterSwapper", "DEFAULT_TENSOR_OVERRIDES", "zero3_linear_wrap"),
        "GatheredParameters": ("_exit",),
        "Init": (
            "_all_gather",
            "_enable_mem_efficient_linear",
            "_partition",
            "_zero_init_param",
            "unpatch_init_and_builtins",
        ),
    },
    "deepspeed.ops.op_builder.builder": {
        "": ("CUDAMismatchException", "MissingCUDAException", "assert_no_cuda_mismatch"),
        "OpBuilder": ("_loaded_ops",),
    },
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper": {
        "": ("PartitionedParamStatus",),
        "AsyncPartitionedParameterSwapper": (
            "remove_partition_and_release_buffers",
            "swap_in",
            "swap_out_and_release",
        ),
    },
    "deepspeed.runtime.swap_tensor.optimizer_utils": {
        "OptimizerSwapper": ("_adjust_for_misaligned_lengths", "is_swappable_tensor"),
    },
    "deepspeed.runtime.utils": {"": ("get_global_norm_of_tensors",)},
}

# The same for attributes that only instances have; of an optimizer, class -> (always, where it is offloaded)
ENGINE_ATTRIBUTES = (
    "basic_optimizer",
    "enable_backward_allreduce",
    "micro_steps",
    "mpu",
    "pipeline_parallelism",
    "_config",
    "_is_gradient_accumulation_boundary",
    "_running_engine_backward",
    "_running_engine_step",
)
OPTIMIZER_ATTRIBUTES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DeepSpeedZeroOptimizer": (
        (
            "all_grad_tensors",
            "averaged_gradients",
            "bit16_groups",
            "clip_grad",
            "cpu_offload",
            "dp_process_group",
            "gradient_accumulation_dtype",
            "ipg_buckets",
            "micro_step_id",
            "overlap_comm",
            "params_already_reduced",
            "params_in_partition",
            "partition_gradients",
            "reduce_bucket_size",
            "_coalesce_grad_reduction",
            "_hp_optimizer_states_linked",
            "_is_gradient_accumulation_boundary",
            "real_dp_process_group",
            "round_robin_bit16_groups",
            "round_robin_bit16_offsets",
            "single_partition_of_fp32_groups",
            "use_grad_accum_attribute",
        ),
        ("_offload_accumulated_param_ids", "accumulated_grads_in_cpu", "grad_position", "norm_for_param_grads"),
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        (
            "clip_grad",
            "dp_process_group",
            "fp16_groups",
            "fp32_partitioned_groups_flat",
            "grad_partitions_flat_buffer",
            "grad_position",
            "inf_or_nan_tracker",
            "ipg_buckets",
            "micro_step_id",
            "params_already_reduced",
            "parameter_offload",
            "offload_optimizer",
            "reduce_bucket_size",
            "sub_group_to_group_id",
            "_coalesce_grad_reduction",
            "_is_gradient_accumulation_boundary",
        ),
        ("_offload_boundary_param_ids", "norm_for_param_grads"),
    ),
    "BF16_Optimizer": (
        (
            "_hp_optimizer_states_linked",
            "_is_gradient_accumulation_boundary",
            "bf16_groups",
            "clip_grad",
            "fp32_groups_flat_partition",
            "fp32_groups_gradients_flat",
            "mpu",
            "norm_type",
            "real_dp_process_group",
        ),
        (),
    ),
    "FP16_Optimizer": (("clip_grad", "fp16_groups", "fp32_groups_flat", "loss_scale_config"), ()),
    "FP16_UnfusedOptimizer": (("clip_grad", "fp16_groups", "fp32_groups", "loss_scale_config"), ()),
}
SWAPPER_ATTRIBUTES = ("numel_alignment",)


def check_deepspeed() -> None:
    """Checks the installed DeepSpeed.

    Raises:
        EnvironmentProblem: outside the supported range, or one of the names that we use is gone.
    """
    version = Version(Version(deepspeed.__version__).base_version)
    if not OLDEST <= version < BEFORE:
        raise EnvironmentProblem(f"DeepSpeed {deepspeed.__version__} is not supported: {_SUPPORTED}")
    missing = [
        ".".join(filter(None, (module, owner, name)))
        for module, owners in PRIVATE_NAMES.items()
        for owner, names in owners.items()
        for name in names
        if not hasattr(_owner(module, owner), name)
    ]
    _refuse(missing)


def check_engine(engine: Any) -> None:
    """Checks an engine that has an optimizer.

    Raises:
        EnvironmentProblem: an attribute that we use is gone.
    """
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    always, offloaded = OPTIMIZER_ATTRIBUTES.get(kind, ((), ()))
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        always += offloaded
    swapper = getattr(optimizer, "optimizer_swapper", None)
    owners = [("DeepSpeedEngine", engine, ENGINE_ATTRIBUTES), (kind, optimizer, always)]
    if swapper is not None:
        owners.append((type(swapper).__name__, swapper, SWAPPER_ATTRIBUTES))
    _refuse(
        [f"{name}.{attribute}" for name, owner, names in owners for attribute in names if not hasattr(owner, attribute)]
    )


def _refuse(missing: list[str]) -> None:
    if missing:
        raise EnvironmentProblem(
            f"DeepSpeed {deepspeed.__version__} lacks what this library drives it by: {', '.join(missing)};"
            f" {_SUPPORTED}"
        )


def _owner(module: str, name: str) -> Any:
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded


def use_device(device: torch.device) -> None:
    """Makes DeepSpeed work on `device`, and quietly.

    On the CPU this also enables fp16, which DeepSpeed refuses on most processors though it trains right.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if device.type != "cpu":
        return
    # Serves inference only, but would be compiled wherever a process group starts, and fail there without ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerator.device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        accelerator = CPU_Accelerator()
        set_accelerator(accelerator)
    accelerator.is_fp16_supported = lambda: True
