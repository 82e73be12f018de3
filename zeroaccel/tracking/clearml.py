"""ClearML."""

from __future__ import annotations

from typing import Any

from zeroaccel.config import environment
from zeroaccel.errors import ConfigError
from zeroaccel.tracking.general import GeneralTracker, on_main_process, taken

_SERIES = ("eval", "test", "train")


class ClearMLTracker(GeneralTracker):
    """A task of ClearML: the current one, which then lives on after `finish()`, else a new one.

    Args:
        run_name: project and name of a new task, unless `CLEARML_PROJECT` and `CLEARML_TASK` say otherwise.
        kwargs: for `Task.init`.
    """

    name = "clearml"
    requires_logging_directory = False

    def __init__(self, run_name: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.user_provided_run_name = run_name
        self.init_kwargs = kwargs
        self._is_ours = False

    @on_main_process
    def start(self) -> None:
        from clearml import Task

        self.task = Task.current_task()
        if self.task:
            return
        self._is_ours = True
        named = dict(self.init_kwargs)
        for argument, variable in (("project_name", "CLEARML_PROJECT"), ("task_name", "CLEARML_TASK")):
            named.setdefault(argument, environment.of_another_tool(variable) or self.user_provided_run_name)
        self.task = Task.init(**named)

    @property
    def tracker(self) -> Any:
        """The `clearml.Task`."""
        return self.task

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> Any:
        return self.task.connect_configuration(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes numbers: in a chart over the steps, or as single values without a step.

        Args:
            values: by name; "eval_loss" is series "eval" of chart "loss", and so for "test" and "train".
            step: number of the step that they belong to.
            kwargs: for `report_scalar` or `report_single_value`.
        """
        report = self.task.get_logger()
        for name, value in taken(self.name, "numbers", values, (int, float)):
            if step is None:
                report.report_single_value(name=name, value=value, **kwargs)
            else:
                report.report_scalar(**_place(name), value=value, iteration=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes images.

        Args:
            values: by name an image as `report_image` takes it.
            step: number of the step that they belong to.
            kwargs: for `report_image`.
        """
        report = self.task.get_logger()
        for name, image in values.items():
            report.report_image(**_place(name), iteration=step, image=image, **kwargs)

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
            kwargs: for `report_table`.

        Raises:
            ConfigError: neither `data` nor `dataframe`.
        """
        if dataframe is None and data is None:
            raise ConfigError(f"log_table({table_name!r}) got no table: pass data (rows) or dataframe")
        rows = data if columns is None else [columns, *(data if data is not None else [])]
        table = rows if dataframe is None else dataframe
        self.task.get_logger().report_table(**_place(table_name), table_plot=table, iteration=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        if self._is_ours:
            self.task.close()


def _place(name: str) -> dict[str, str]:
    """The chart that a name belongs to, and which of its curves it is."""
    first, _, rest = name.partition("_")
    return {"title": rest, "series": first} if first in _SERIES and "_" in name else {"title": name, "series": "train"}
