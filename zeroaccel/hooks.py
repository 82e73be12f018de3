"""Hooks by which Accelerate spreads a model over devices: they can be taken away, and are refused else."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.engine.placement": [
            "remove_hook_from_module",
            "remove_hook_from_submodules",
        ],
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
        ],
    },
)
