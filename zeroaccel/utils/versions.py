"""Versions, as in `accelerate.utils.versions`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.packages": [
            "compare_versions",
            "is_torch_version",
        ],
    },
)
