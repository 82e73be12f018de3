"""Other kinds of parallelism: refused."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.refused": [
            "ParallelismConfig",
        ],
    },
)
