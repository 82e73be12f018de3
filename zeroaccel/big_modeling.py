"""Models made without memory, as in `accelerate.big_modeling`; device maps are refused."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.engine.placement": [
            "init_empty_weights",
            "init_on_device",
        ],
        "zeroaccel.refused": [
            "attach_layerwise_casting_hooks",
            "cpu_offload",
            "cpu_offload_with_hook",
            "disk_offload",
            "dispatch_model",
            "load_checkpoint_and_dispatch",
        ],
    },
)
