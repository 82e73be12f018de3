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

# module -> class ("" for the module itself) -> names in use
PRIVATE_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepspeed.runtime.engine": {
        "": ("_ENGINE_BACKWARD_GRAPH_TRACKER",),
        "DeepSpeedEngine": (
            "_backward_prologue",
            "_backward_epilogue",
            "_broadcast_model",
            "allreduce_gradients",
            "set_gradient_accumulation_boundary",
            "was_step_applied",
        ),
    },
    "deepspeed.runtime.base_optimizer": {
        "ZeROOptimizer": ("_backward_active_depth", "clear_backward_seen_flag"),
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        "": ("INITIAL_MICRO_STEP_ID",),
        "DeepSpeedZeroOptimizer": (
            "initialize_optimizer_states",
            "finalize_gradient_accumulation_boundary",
            "get_param_gradient_attribute",
            "get_param_id",
            "reset_cpu_buffers",
            "scaled_global_norm",
        ),
    },
    "deepspeed.runtime.zero.stage3": {
        "": ("combine_grad_norm_groups",),
        "DeepSpeedZeroOptimizer_Stage3": (
            "initialize_optimizer_states",
            "_get_norm_groups",
            "_swappable_optimizer_subgroup",
            "finalize_gradient_accumulation_boundary",
            "get_param_id",
        ),
    },
    "deepspeed.runtime.bf16_optimizer": {"BF16_Optimizer": ("get_grads_for_norm",)},
    "deepspeed.runtime.fp16.fused_optimizer": {"FP16_Optimizer": ("initialize_optimizer_states",)},
    "deepspeed.runtime.fp16.unfused_optimizer": {"FP16_UnfusedOptimizer": ("initialize_optimizer_states",)},
    "deepspeed.runtime.zero.partition_parameters": {"Init": ("_zero_init_param",)},
    "deepspeed.runtime.swap_tensor.optimizer_utils": {
        "OptimizerSwapper": ("_adjust_for_misaligned_lengths", "is_swappable_tensor"),
    },
    "deepspeed.runtime.utils": {"": ("get_global_norm_of_tensors",)},
}


def check_deepspeed() -> None:
    """Checks the installed DeepSpeed.

    Raises:
        EnvironmentProblem: outside the supported range, or one of the names that we use is gone.
    """
    version = Version(Version(deepspeed.__version__).base_version)
    supported = f"install 'deepspeed>={OLDEST},<{BEFORE}'"
    if not OLDEST <= version < BEFORE:
        raise EnvironmentProblem(f"DeepSpeed {deepspeed.__version__} is not supported: {supported}")
    missing = [
        ".".join(filter(None, (module, owner, name)))
        for module, owners in PRIVATE_NAMES.items()
        for owner, names in owners.items()
        for name in names
        if not hasattr(_owner(module, owner), name)
    ]
    if missing:
        raise EnvironmentProblem(
            f"DeepSpeed {deepspeed.__version__} lacks what this library drives it by: {', '.join(missing)}; {supported}"
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
