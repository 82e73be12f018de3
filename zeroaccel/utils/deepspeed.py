"""What `accelerate.utils.deepspeed` has for DeepSpeed, and `logical_shape`."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.document": [
            "HfDeepSpeedConfig",
        ],
        "zeroaccel.engine.offload": [
            "map_pytorch_optim_to_deepspeed",
        ],
        "zeroaccel.engine.optimizer": [
            "DeepSpeedOptimizerWrapper",
            "DummyOptim",
        ],
        "zeroaccel.engine.scheduler": [
            "DeepSpeedSchedulerWrapper",
            "DummyScheduler",
        ],
        "zeroaccel.engine.shards": [
            "logical_shape",
        ],
        "zeroaccel.engine.wrapper": [
            "DeepSpeedEngineWrapper",
        ],
        "zeroaccel.state": [
            "get_active_deepspeed_plugin",
        ],
    },
)
