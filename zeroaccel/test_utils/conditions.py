"""Decorators that skip a test, or all tests of a class, where this machine lacks something."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from zeroaccel.config import packages
from zeroaccel.config.env_patch import parse_flag_from_env
from zeroaccel.engine import machine

Test = TypeVar("Test", bound=Callable[..., Any])
Decorator = Callable[[Test], Test]


def get_backend() -> tuple[str, int, Callable[[], int]]:
    """Type of this machine's accelerator, how many there are, and what tells the memory that PyTorch uses on it.

    On a machine without any: `("cpu", 1, <0>)`.
    """
    if machine.is_cuda_available():
        return "cuda", torch.cuda.device_count(), torch.cuda.memory_allocated
    if machine.is_mps_available():
        return "mps", 1, torch.mps.current_allocated_memory
    checks = (
        machine.is_mlu_available,
        machine.is_sdaa_available,
        machine.is_musa_available,
        machine.is_npu_available,
        machine.is_xpu_available,
        machine.is_hpu_available,
        machine.is_neuron_available,
    )
    if not any(is_available() for is_available in checks):
        return "cpu", 1, lambda: 0
    name, _ = machine.get_current_device_type()
    device: Any = getattr(torch, name)
    return name, device.device_count(), device.memory_allocated


torch_device, device_count, memory_allocated_func = get_backend()


def skip(test_case: Test) -> Test:
    """Skips the test."""
    return unittest.skip("switched off")(test_case)


def slow(test_case: Test) -> Test:
    """Skips the test unless the environment variable `RUN_SLOW` is true."""
    return unittest.skipUnless(parse_flag_from_env("RUN_SLOW"), "slow: runs with RUN_SLOW=1")(test_case)


def run_first(test_case: Test) -> Test:
    """Marks the test with `order(1)`, by which the plugin pytest-order runs it before the others."""
    if not packages.is_pytest_available():
        return test_case
    import pytest

    return pytest.mark.order(1)(test_case)  # type: ignore[no-any-return]


def _require(condition: Callable[[], bool], what: str) -> Decorator[Any]:
    """A decorator that skips a test unless the condition holds when the test is defined."""

    def decorator(test_case: Test) -> Test:
        return unittest.skipUnless(condition(), f"needs {what}")(test_case)

    decorator.__doc__ = f"Skips the test unless there is {what}."
    return decorator


def _cuda() -> bool:
    return machine.is_cuda_available() and not machine.is_torch_xla_available()


def _fp8() -> bool:
    on_old_gpu = torch.cuda.is_available() and not machine.check_cuda_fp8_capability()
    return packages.is_fp8_available() and not on_old_gpu


def _one_tracker() -> bool:
    trackers = (
        packages.is_wandb_available,
        packages.is_tensorboard_available,
        packages.is_trackio_available,
        packages.is_swanlab_available,
    )
    return any(is_available() for is_available in trackers) and not packages.is_comet_ml_available()


# Devices.
require_cpu = _require(lambda: torch_device == "cpu", "a machine without accelerator")
require_non_cpu = _require(lambda: torch_device != "cpu", "an accelerator")
require_non_xpu = _require(lambda: torch_device != "xpu", "a machine without Intel GPU")
require_non_hpu = _require(lambda: torch_device != "hpu", "a machine without Gaudi")
require_cuda = _require(_cuda, "a CUDA GPU")
require_cuda_or_hpu = _require(lambda: _cuda() or machine.is_hpu_available(), "a CUDA GPU or a Gaudi")
require_cuda_or_xpu = _require(lambda: _cuda() or machine.is_xpu_available(), "a CUDA or Intel GPU")
require_xpu = _require(machine.is_xpu_available, "an Intel GPU")
require_mlu = _require(machine.is_mlu_available, "an MLU")
require_sdaa = _require(machine.is_sdaa_available, "an SDAA device")
require_musa = _require(machine.is_musa_available, "a MUSA device")
require_npu = _require(machine.is_npu_available, "an NPU")
require_neuron = _require(machine.is_neuron_available, "Neuron cores")
require_mps = _require(machine.is_mps_available, "an Apple GPU")
require_tpu = _require(lambda: machine.is_torch_xla_available(check_is_tpu=True), "a TPU")
require_non_torch_xla = _require(lambda: not machine.is_torch_xla_available(), "an environment without torch_xla")
require_single_device = _require(lambda: torch_device != "cpu" and device_count == 1, "exactly one accelerator")
require_single_gpu = _require(lambda: torch.cuda.device_count() == 1, "exactly one CUDA GPU")
require_single_xpu = _require(lambda: torch.xpu.device_count() == 1, "exactly one Intel GPU")
require_multi_device = _require(lambda: device_count > 1, "several accelerators")
require_multi_gpu = _require(lambda: torch.cuda.device_count() > 1, "several CUDA GPUs")
require_multi_xpu = _require(lambda: torch.xpu.device_count() > 1, "several Intel GPUs")
require_multi_gpu_or_xpu = _require(
    lambda: torch_device in ("cuda", "xpu") and device_count > 1, "several CUDA or Intel GPUs"
)

# Number formats.
require_fp16 = _require(machine.is_fp16_available, "fp16")
require_fp8 = _require(_fp8, "8-bit floats: a library and a GPU for them")

# Packages.
require_aim = _require(packages.is_aim_available, "aim")
require_bnb = _require(packages.is_bnb_available, "bitsandbytes")
require_clearml = _require(packages.is_clearml_available, "clearml")
require_comet_ml = _require(packages.is_comet_ml_available, "comet_ml")
require_datasets = _require(packages.is_datasets_available, "datasets")
require_deepspeed = _require(packages.is_deepspeed_available, "DeepSpeed")
require_dvclive = _require(packages.is_dvclive_available, "dvclive")
require_huggingface_suite = _require(
    lambda: packages.is_transformers_available() and packages.is_datasets_available(), "transformers and datasets"
)
require_import_timer = _require(packages.is_import_timer_available, "import_timer")
require_matplotlib = _require(packages.is_matplotlib_available, "matplotlib")
require_mlflow = _require(packages.is_mlflow_available, "mlflow")
require_pandas = _require(packages.is_pandas_available, "pandas")
require_peft = _require(packages.is_peft_available, "peft")
require_schedulefree = _require(packages.is_schedulefree_available, "schedulefree")
require_swanlab = _require(packages.is_swanlab_available, "swanlab")
require_tensorboard = _require(packages.is_tensorboard_available, "TensorBoard")
require_timm = _require(packages.is_timm_available, "timm")
require_torchao = _require(packages.is_torchao_available, "torchao")
require_torchdata_stateful_dataloader = _require(
    packages.is_torchdata_stateful_dataloader_available, "torchdata with StatefulDataLoader"
)
require_torchvision = _require(packages.is_torchvision_available, "torchvision")
require_trackers = _require(_one_tracker, "one of wandb, TensorBoard, trackio and swanlab, and no comet_ml")
require_trackio = _require(packages.is_trackio_available, "trackio")
require_transformer_engine = _require(packages.is_transformer_engine_available, "Transformer Engine")
require_transformer_engine_mxfp8 = _require(lambda: False, "8-bit floats, which this library does not use")
require_transformers = _require(packages.is_transformers_available, "transformers")
require_triton = _require(packages.is_triton_available, "triton")
require_wandb = _require(packages.is_wandb_available, "wandb")

# What this library leaves to others.
require_fsdp2 = _require(lambda: False, "FSDP, which this library does not use")
require_pippy = _require(lambda: False, "pipeline parallelism, which this library does not have")
require_tp = _require(lambda: False, "tensor parallelism, which this library does not have")


def require_torch_min_version(test_case: Test | None = None, version: str | None = None) -> Any:
    """Skips the test on a PyTorch older than `version`: `@require_torch_min_version(version="2.5")`."""
    if test_case is None:
        return partial(require_torch_min_version, version=version)
    assert version is not None, "write @require_torch_min_version(version=...)"
    return unittest.skipUnless(packages.is_torch_version(">=", version), f"needs torch {version}")(test_case)


__all__ = ["run_first", "skip", "slow", *(name for name in list(globals()) if name.startswith("require_"))]
