"""What test suites of training scripts import from `accelerate.test_utils`."""

from __future__ import annotations

from zeroaccel.lazy import reexport
from zeroaccel.test_utils.conditions import __all__ as _conditions

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.test_utils.conditions": _conditions,
        "zeroaccel.test_utils.testing": [
            "DEFAULT_LAUNCH_COMMAND",
            "are_the_same_tensors",
            "assert_exception",
            "capture_call_output",
            "device_count",
            "execute_subprocess_async",
            "get_launch_command",
            "get_torch_dist_unique_port",
            "memory_allocated_func",
            "path_in_accelerate_package",
            "path_in_zeroaccel_package",
            "pytest_xdist_worker_id",
            "torch_device",
        ],
        "zeroaccel.test_utils.training": ["RegressionDataset", "RegressionModel"],
    },
    submodules=["testing", "training"],
)
