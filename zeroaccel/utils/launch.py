"""What starts a function on several ranks, as in `accelerate.utils.launch`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.launchers": [
            "PrepareForLaunch",
        ],
    },
)
