"""Trackio."""

from __future__ import annotations

from zeroaccel.tracking.project_run import ProjectRunTracker


class TrackioTracker(ProjectRunTracker):
    """A run of Trackio; arguments beside the name are for `trackio.init`."""

    name = _module = "trackio"
