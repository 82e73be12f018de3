"""What this machine has: accelerators, number formats, a kernel that is new enough."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from packaging.version import Version

from zeroaccel.config.env_patch import parse_flag_from_env, patch_environment
from zeroaccel.logging import library_logger
from zeroaccel.state import best_device

logger = library_logger(__name__)

_OLDEST_KERNEL = "5.5.0"  # older ones make some processes hang in shared memory


def is_cuda_available() -> bool:
    """Whether there is a CUDA (or ROCm) GPU; asks the driver without starting CUDA, so that a fork stays possible."""
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Whether there is an AMD GPU that this PyTorch can use."""
    return torch.version.hip is not None and torch.cuda.is_available()


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether there is an Apple GPU. Every PyTorch that this library runs on is newer than `min_version`."""
    return torch.backends.mps.is_available() and torch.backends.mps.is_built()


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether there is an Intel GPU. `check_device` is accepted: the device is always looked for."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


class _DeviceCheck(Protocol):
    def __call__(self, check_device: bool = False) -> bool: ...


def _brought_by(package: str, device: str) -> _DeviceCheck:
    """A function that tells whether a device is there that a package adds to PyTorch as `torch.<device>`."""

    @functools.cache
    def look() -> bool:
        if importlib.util.find_spec(package) is None:
            return False
        try:
            importlib.import_module(package)
        except Exception:  # installed, but for a driver that is not there
            return False
        return hasattr(torch, device) and bool(getattr(torch, device).is_available())

    def is_available(check_device: bool = False) -> bool:
        return look()

    is_available.__doc__ = f"Whether {package} is installed and finds a device. `check_device`: it always looks."
    return is_available


is_mlu_available = _brought_by("torch_mlu", "mlu")
is_musa_available = _brought_by("torch_musa", "musa")
is_npu_available = _brought_by("torch_npu", "npu")
is_sdaa_available = _brought_by("torch_sdaa", "sdaa")
is_neuron_available = _brought_by("torch_neuronx", "neuron")
_finds_hpu = _brought_by("habana_frameworks", "hpu")


def is_hpu_available(init_hccl: bool = False) -> bool:
    """Whether there is a Gaudi accelerator. `init_hccl` loads its communication library, too."""
    found = _finds_hpu()
    if found and init_hccl:
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
    return found


def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Whether torch_xla is installed and `USE_TORCH_XLA` does not say no; this library never runs on it.

    Args:
        check_is_tpu: and its device is a TPU.
        check_is_gpu: and its device is a GPU.
    """
    if importlib.util.find_spec("torch_xla") is None or not parse_flag_from_env("USE_TORCH_XLA", True):
        return False
    if not check_is_tpu and not check_is_gpu:
        return True
    device: str = importlib.import_module("torch_xla.runtime").device_type()
    return device == "TPU" if check_is_tpu else device in ("GPU", "CUDA")


def is_torch_distributed_available() -> bool:
    """Whether this PyTorch was built with process groups."""
    return bool(torch.distributed.is_available())


def is_xccl_available() -> bool:
    """Whether this PyTorch has Intel's communication backend."""
    check: Any = getattr(torch.distributed.distributed_c10d, "is_xccl_available", None)
    return bool(check is not None and check())


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether this machine's device computes in bf16. `ignore_tpu` is accepted: TPUs are not used here."""
    if is_cuda_available():
        return bool(torch.cuda.is_bf16_supported())
    if is_xpu_available():
        return torch.xpu.is_bf16_supported()
    if is_mps_available():
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def is_fp16_available() -> bool:
    """Whether this machine's device computes in fp16: all that this library runs on do."""
    return True


def check_cuda_fp8_capability() -> bool:
    """Whether the first GPU has 8-bit floats (compute capability 8.9 or more); starts CUDA."""
    return torch.cuda.get_device_capability() >= (8, 9)


def check_cuda_p2p_ib_support() -> bool:
    """Whether GPUs may talk to each other directly: NCCL finds out by itself."""
    return True


def get_current_device_type() -> tuple[str, str]:
    """Type of this machine's accelerator, and the `DistributedType` of several of them; starts no device.

    Returns:
        For example `("cuda", "MULTI_GPU")`, which is also the answer on a machine without any.
    """
    checks = {
        "mlu": is_mlu_available,
        "sdaa": is_sdaa_available,
        "musa": is_musa_available,
        "npu": is_npu_available,
        "hpu": is_hpu_available,
        "xpu": is_xpu_available,
        "neuron": is_neuron_available,
    }
    found = next((device for device, is_available in checks.items() if is_available()), None)
    return ("cuda", "MULTI_GPU") if found is None else (found, f"MULTI_{found.upper()}")


def check_os_kernel() -> None:
    """Warns on a Linux whose kernel is older than 5.5, on which processes may hang."""
    system = platform.uname()
    found = re.match(r"\d+\.\d+(\.\d+)?", system.release)
    if system.system == "Linux" and found is not None and Version(found[0]) < Version(_OLDEST_KERNEL):
        logger.warning("the kernel is %s, older than %s: processes may hang", found[0], _OLDEST_KERNEL)


@dataclass(frozen=True)
class Gpu:
    """An accelerator: name, bytes of memory, and CUDA's compute capability ("" on others)."""

    name: str
    memory: int
    capability: str


def gpus() -> list[Gpu]:
    """The visible accelerators with memory of their own (CUDA, ROCm, XPU)."""
    kind = best_device().type
    if kind not in ("cuda", "xpu"):
        return []
    module = getattr(torch, kind)
    found = [module.get_device_properties(index) for index in range(module.device_count())]
    return [Gpu(each.name, each.total_memory, f"{each.major}.{each.minor}" if kind == "cuda" else "") for each in found]
