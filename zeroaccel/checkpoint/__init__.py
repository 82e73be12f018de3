"""Checkpoints: of a whole run, and of the weights alone."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.checkpoint.consolidate": [
            "consolidate",
            "get_fp32_state_dict_from_zero_checkpoint",
            "load_state_dict_from_zero_checkpoint",
        ],
        "zeroaccel.checkpoint.preemption": ["PREEMPTED"],
    },
)
