"""The tools that share the interface of Weights & Biases: `init(project=...)`, `config`, and a run that logs."""

from __future__ import annotations

import importlib
from typing import Any

from zeroaccel.tracking.general import GeneralTracker, on_main_process


class ProjectRunTracker(GeneralTracker):
    """A run of such a tool.

    Args:
        run_name: becomes its project.
        kwargs: for the tool's `init`.
    """

    requires_logging_directory = False
    main_process_only = False
    _module: str

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @property
    def _tool(self) -> Any:
        return importlib.import_module(self._module)

    @on_main_process
    def start(self) -> None:
        self.run = self._tool.init(project=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The tool's run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._tool.config.update(values, allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.run.finish()


class ImageRunTracker(ProjectRunTracker):
    """One that shows images, too."""

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes lists of images.

        Args:
            values: by name, each image as the tool's `Image` takes it.
            step: number of the step that they belong to.
            kwargs: for the run's `log`.
        """
        for name, images in values.items():
            self.log({name: list(map(self._tool.Image, images))}, step=step, **kwargs)
