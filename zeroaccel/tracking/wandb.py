"""Weights & Biases."""

from __future__ import annotations

from typing import Any

from zeroaccel.tracking.general import on_main_process
from zeroaccel.tracking.project_run import ImageRunTracker


class WandBTracker(ImageRunTracker):
    """A run of Weights & Biases; arguments beside the name are for `wandb.init`."""

    name = _module = "wandb"

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
            kwargs: for the run's `log`.
        """
        table = self._tool.Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step=step, **kwargs)
