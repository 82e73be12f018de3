"""Trackers by name, and which of those that the user wants can run here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from zeroaccel.config import packages
from zeroaccel.config.types import LoggerType
from zeroaccel.errors import ConfigError, ConfigTypeError
from zeroaccel.logging import library_logger
from zeroaccel.tracking.aim import AimTracker
from zeroaccel.tracking.clearml import ClearMLTracker
from zeroaccel.tracking.comet import CometMLTracker
from zeroaccel.tracking.dvclive import DVCLiveTracker
from zeroaccel.tracking.general import GeneralTracker
from zeroaccel.tracking.mlflow import MLflowTracker
from zeroaccel.tracking.swanlab import SwanLabTracker
from zeroaccel.tracking.tensorboard import TensorBoardTracker
from zeroaccel.tracking.trackio import TrackioTracker
from zeroaccel.tracking.wandb import WandBTracker

logger = library_logger(__name__)

LOGGER_TYPE_TO_CLASS: dict[str, type[Any]] = {
    "aim": AimTracker,
    "comet_ml": CometMLTracker,
    "mlflow": MLflowTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "clearml": ClearMLTracker,
    "dvclive": DVCLiveTracker,
    "swanlab": SwanLabTracker,
    "trackio": TrackioTracker,
}

_INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": packages.is_tensorboard_available,
    "wandb": packages.is_wandb_available,
    "comet_ml": packages.is_comet_ml_available,
    "aim": packages.is_aim_available,
    "mlflow": packages.is_mlflow_available,
    "clearml": packages.is_clearml_available,
    "dvclive": packages.is_dvclive_available,
    "swanlab": packages.is_swanlab_available,
    "trackio": packages.is_trackio_available,
}

# What makes an object a tracker: integrations of other libraries derive theirs from Accelerate's base class.
_INTERFACE = ("name", "start", "store_init_configuration", "log", "finish")

Wanted = str | LoggerType | GeneralTracker


def get_available_trackers() -> list[LoggerType]:
    """The built-in trackers whose packages are installed."""
    return [LoggerType(name) for name, is_installed in _INSTALLED.items() if is_installed()]


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Makes a tracker of your own known by its name, for `Accelerator(log_with="its name")`.

    Args:
        tracker_class: with `name` and `requires_logging_directory` in the class. `init_trackers` makes it from the
            project's name, then `logging_dir` if it requires one, and its `init_kwargs`.

    Raises:
        ConfigTypeError: it is no subclass of `GeneralTracker`.
        ConfigError: it lacks one of the two.
    """
    if not isinstance(tracker_class, type) or not issubclass(tracker_class, GeneralTracker):
        raise ConfigTypeError(f"register_tracker_class takes a subclass of GeneralTracker, got {tracker_class!r}")
    name = getattr(tracker_class, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{tracker_class.__name__} needs a name: write name = 'my_tracker' in the class")
    if not hasattr(tracker_class, "requires_logging_directory"):
        raise ConfigError(f"{tracker_class.__name__} does not say whether it needs requires_logging_directory")
    if LOGGER_TYPE_TO_CLASS.get(name, tracker_class) is not tracker_class:
        warnings.warn(f"tracker {name!r} is {tracker_class.__name__} from now on, not the one before", stacklevel=2)
    LOGGER_TYPE_TO_CLASS[name] = tracker_class


def filter_trackers(
    log_with: Wanted | Sequence[Wanted] | None, logging_dir: str | os.PathLike[str] | None = None
) -> list[Any]:
    """Those of the wanted trackers that can run here, in their order, each name once.

    Args:
        log_with: names, "all" for objects and then all that are installed, or trackers; one or several.
        logging_dir: where logs go.

    Raises:
        ConfigError: a name is unknown, or its tracker needs a `logging_dir`.
    """
    wanted = [] if log_with is None else list(log_with) if isinstance(log_with, (list, tuple)) else [log_with]
    chosen: list[Any] = [each if _is_tracker(each) else _known(each) for each in wanted]
    if LoggerType.ALL in chosen:
        found = [each for each in chosen if _is_tracker(each)] + _all_that_can_run(logging_dir)
    else:
        once = [each for place, each in enumerate(chosen) if _is_tracker(each) or each not in chosen[:place]]
        found = [each for each in once if _is_tracker(each) or _can_run(each)]
        for name in found:
            if _needs_folder(name) and logging_dir is None:
                raise ConfigError(
                    f"log_with={str(name)!r} writes files, and there is no folder for them: pass"
                    " Accelerator(project_dir=...), or project_config=ProjectConfiguration(logging_dir=...)"
                )
    if wanted and not found:
        logger.warning("log_with=%r: nothing is logged, as no tracker is there", log_with)
    return found


def _is_tracker(candidate: Any) -> bool:
    return not isinstance(candidate, (str, type)) and all(hasattr(candidate, part) for part in _INTERFACE)


def _known(name: Any) -> str:
    """A name that is known, as `LoggerType` where it is a built-in one's."""
    if isinstance(name, str):
        if name in LoggerType:
            return LoggerType(name)
        if name in LOGGER_TYPE_TO_CLASS:
            return name
    choice = ", ".join(repr(known) for known in [LoggerType.ALL.value, *LOGGER_TYPE_TO_CLASS])
    raise ConfigError(f"log_with={name!r} is no tracker: choose from {choice}, or pass a GeneralTracker object")


def _needs_folder(chosen: Any) -> bool:
    return isinstance(chosen, str) and bool(LOGGER_TYPE_TO_CLASS[chosen].requires_logging_directory)


def _can_run(name: str) -> bool:
    if name not in _INSTALLED or _INSTALLED[name]():
        return True
    logger.warning("%s is not installed: log_with leaves it out", name)
    return False


def _all_that_can_run(logging_dir: str | os.PathLike[str] | None) -> list[Any]:
    found = get_available_trackers()
    homeless = [name for name in found if _needs_folder(name) and logging_dir is None]
    if homeless:
        names = ", ".join(homeless)
        logger.warning("log_with='all' leaves %s out, which needs Accelerator(project_dir=...)", names)
    return [name for name in found if name not in homeless]
