"""Seeds and random states, as in `accelerate.utils.random`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.distributed.random": [
            "set_seed",
            "synchronize_rng_state",
            "synchronize_rng_states",
        ],
    },
)
