"""SwanLab."""

from __future__ import annotations

from zeroaccel.tracking.general import on_main_process
from zeroaccel.tracking.project_run import ImageRunTracker


class SwanLabTracker(ImageRunTracker):
    """A run of SwanLab; arguments beside the name are for `swanlab.init`."""

    name = _module = "swanlab"

    @on_main_process
    def start(self) -> None:
        super().start()
        self._tool.config["FRAMEWORK"] = "zeroaccel"
