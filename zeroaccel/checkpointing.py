"""States in single files, where `accelerate.checkpointing` has them; `accelerator.save_state` writes others."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.checkpoint.accelerate_folder": [
            "load_accelerator_state",
            "load_custom_state",
            "save_accelerator_state",
            "save_custom_state",
        ],
    },
)
