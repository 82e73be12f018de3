"""The progress bar of `accelerate.utils.tqdm`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.distributed.process": [
            "tqdm",
        ],
    },
)
