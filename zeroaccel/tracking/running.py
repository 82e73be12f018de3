"""The trackers of one `Accelerator`: what `init_trackers`, `log` and `get_tracker` do on rank 0, and elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from zeroaccel.errors import ConfigError
from zeroaccel.tracking.general import GeneralTracker
from zeroaccel.tracking.register import LOGGER_TYPE_TO_CLASS


def made(
    log_with: list[Any],
    logging_dir: str | os.PathLike[str] | None,
    project_name: str,
    init_kwargs: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """The trackers of `log_with`, not started yet.

    Args:
        log_with: names and objects.
        logging_dir: where logs go.
        project_name: for those that are made here.
        init_kwargs: further arguments by tracker's name.
    """
    trackers = []
    for each in log_with:
        if not isinstance(each, str):
            trackers.append(each)
            continue
        tracker_class = LOGGER_TYPE_TO_CLASS[each]
        made_of = (project_name, logging_dir) if tracker_class.requires_logging_directory else (project_name,)
        trackers.append(tracker_class(*made_of, **init_kwargs.get(each, {})))
    return trackers


def start(trackers: list[Any], config: dict[str, Any] | None, running: list[Any]) -> None:
    """Starts trackers, and has them note the hyperparameters.

    Args:
        trackers: new ones.
        config: hyperparameters.
        running: gets each of them as soon as it runs.
    """
    for tracker in trackers:
        tracker.start()
        running.append(tracker)
    if config is not None:
        for tracker in trackers:
            tracker.store_init_configuration(config)


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
