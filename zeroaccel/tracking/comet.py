"""Comet."""

from __future__ import annotations

from typing import Any

from packaging.version import parse

from zeroaccel.tracking.general import GeneralTracker, on_main_process, taken


class CometMLTracker(GeneralTracker):
    """An experiment of Comet.

    Args:
        run_name: becomes its project.
        kwargs: for `comet_ml.start`, before Comet 3.41 for `comet_ml.Experiment`.
    """

    name = "comet_ml"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        import comet_ml

        old = parse(comet_ml.__version__) < parse("3.41.0")
        begin = comet_ml.Experiment if old else comet_ml.start
        self.writer = begin(project_name=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """Comet's experiment."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.writer.log_parameters(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes numbers as metrics, texts as other values, dictionaries as several metrics.

        What is none of these is left out with a warning.

        Args:
            values: by name.
            step: number of the step that they belong to.
            kwargs: for `log_metric`, `log_other` or `log_metrics`.
        """
        if step is not None:
            self.writer.set_step(step)
        for name, value in taken(self.name, "numbers and texts", values, (int, float, str, dict)):
            if isinstance(value, (int, float)):
                self.writer.log_metric(name, value, step=step, **kwargs)
            elif isinstance(value, str):
                self.writer.log_other(name, value, **kwargs)
            else:
                self.writer.log_metrics(value, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self.writer.end()
