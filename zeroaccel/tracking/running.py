"""The trackers of one `Accelerator`: what `init_trackers`, `log` and `get_tracker` do on rank 0, and elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from zeroaccel.errors import ConfigError
from zeroaccel.state import PartialState
from zeroaccel.tracking.general import GeneralTracker
from zeroaccel.tracking.register import LOGGER_TYPE_TO_CLASS


def start(
    log_with: list[Any],
    logging_dir: str | os.PathLike[str] | None,
    project_name: str,
    config: dict[str, Any] | None,
    init_kwargs: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """Starts trackers on rank 0.

    Args:
        log_with: names and objects.
        logging_dir: where logs go.
        project_name: for those that are made here.
        config: hyperparameters.
        init_kwargs: further arguments by tracker's name.

    Returns:
        The trackers; none on the other ranks.
    """
    if not PartialState().is_main_process:
        return []
    trackers = []
    for each in log_with:
        if not isinstance(each, str):
            trackers.append(each)
            continue
        made_of = (
            (project_name, logging_dir) if LOGGER_TYPE_TO_CLASS[each].requires_logging_directory else (project_name,)
        )
        trackers.append(LOGGER_TYPE_TO_CLASS[each](*made_of, **init_kwargs.get(each, {})))
    for tracker in trackers:
        tracker.start()
    if config is not None:
        for tracker in trackers:
            tracker.store_init_configuration(config)
    return trackers


def find(trackers: list[Any], name: str, unwrap: bool) -> Any:
    """The tracker of this name, or what it wraps; the null tracker where nothing is tracked.

    Raises:
        ConfigError: there are trackers, and none has this name.
    """
    for tracker in trackers:
        if tracker.name == name:
            return tracker.tracker if unwrap else tracker
    if trackers:
        there = ", ".join(repr(tracker.name) for tracker in trackers)
        raise ConfigError(f"get_tracker({name!r}): there is none of this name, but {there}")
    return GeneralTracker(_blank=True)
