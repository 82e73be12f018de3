"""SwanLab."""

from __future__ import annotations

from typing import Any

from zeroaccel.tracking.general import GeneralTracker, on_main_process


class SwanLabTracker(GeneralTracker):
    """A run of SwanLab.

    Args:
        run_name: becomes its project.
        kwargs: for `swanlab.init`.
    """

    name = "swanlab"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        import swanlab

        self.run = swanlab.init(project=self.run_name, **self.init_kwargs)
        swanlab.config["FRAMEWORK"] = "zeroaccel"

    @property
    def tracker(self) -> Any:
        """SwanLab's run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        import swanlab

        swanlab.config.update(values, allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes lists of images.

        Args:
            values: by name, each image as `swanlab.Image` takes it.
            step: number of the step that they belong to.
            kwargs: for SwanLab's `log`.
        """
        import swanlab

        self.log({name: list(map(swanlab.Image, images)) for name, images in values.items()}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.run.finish()
