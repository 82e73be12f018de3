"""Hooks by which Accelerate spreads a model over devices: refused."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.refused": [
            "AlignDevicesHook",
            "CpuOffload",
            "LayerwiseCastingHook",
            "ModelHook",
            "SequentialHook",
            "UserCpuOffloadHook",
            "add_hook_to_module",
            "attach_align_device_hook",
            "attach_align_device_hook_on_blocks",
            "attach_execution_device_hook",
            "remove_hook_from_module",
            "remove_hook_from_submodules",
        ],
    },
)
