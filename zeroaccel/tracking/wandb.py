"""Weights & Biases."""

from __future__ import annotations

from typing import Any

from zeroaccel.tracking.general import GeneralTracker, on_main_process


class WandBTracker(GeneralTracker):
    """A run of Weights & Biases.

    Args:
        run_name: becomes its project.
        kwargs: for `wandb.init`.
    """

    name = "wandb"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        import wandb

        self.run = wandb.init(project=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The `wandb.Run`."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        import wandb

        wandb.config.update(values, allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes lists of images.

        Args:
            values: by name, each image as `wandb.Image` takes it.
            step: number of the step that they belong to.
            kwargs: for `Run.log`.
        """
        import wandb

        self.log({name: list(map(wandb.Image, images)) for name, images in values.items()}, step=step, **kwargs)

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Notes a table.

        Args:
            table_name: its name.
            columns, data: names of the columns and rows; or
            dataframe: both in one, as pandas has it.
            step: number of the step that it belongs to.
            kwargs: for `Run.log`.
        """
        import wandb

        self.log({table_name: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.run.finish()
