"""Experiment trackers, as in `accelerate.tracking`: one a file, and the register that knows them by name."""

from __future__ import annotations

from zeroaccel.lazy import reexport

__getattr__, __all__ = reexport(
    __name__,
    {
        "zeroaccel.config.types": ["LoggerType"],
        "zeroaccel.tracking.aim": ["AimTracker"],
        "zeroaccel.tracking.clearml": ["ClearMLTracker"],
        "zeroaccel.tracking.comet": ["CometMLTracker"],
        "zeroaccel.tracking.dvclive": ["DVCLiveTracker"],
        "zeroaccel.tracking.general": ["GeneralTracker", "on_main_process"],
        "zeroaccel.tracking.mlflow": ["MLflowTracker"],
        "zeroaccel.tracking.register": [
            "LOGGER_TYPE_TO_CLASS",
            "filter_trackers",
            "get_available_trackers",
            "register_tracker_class",
        ],
        "zeroaccel.tracking.swanlab": ["SwanLabTracker"],
        "zeroaccel.tracking.tensorboard": ["TensorBoardTracker"],
        "zeroaccel.tracking.trackio": ["TrackioTracker"],
        "zeroaccel.tracking.wandb": ["WandBTracker"],
    },
)
