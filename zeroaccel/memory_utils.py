"""The older place of `zeroaccel.utils.memory`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.engine.memory": [
            "clear_device_cache",
            "find_executable_batch_size",
            "release_memory",
            "should_reduce_batch_size",
        ],
    },
)
