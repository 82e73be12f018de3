"""DVCLive."""

from __future__ import annotations

from typing import Any

from zeroaccel.tracking.general import GeneralTracker, on_main_process, warn_left_out


class DVCLiveTracker(GeneralTracker):
    """DVCLive.

    Args:
        run_name: ignored, DVCLive has no name for a run.
        live: a `dvclive.Live` that exists already; default: a new one.
        kwargs: for `dvclive.Live`.
    """

    name = "dvclive"
    requires_logging_directory = False

    def __init__(self, run_name: str | None = None, live: Any | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.live = live
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        from dvclive import Live

        if self.live is None:
            self.live = Live(**self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The `dvclive.Live`."""
        return self.live

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.tracker.log_params(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes metrics and ends DVCLive's step.

        Args:
            values: by name; what DVCLive cannot take is left out with a warning.
            step: number of the step that they belong to; default: the next one.
            kwargs: for `Live.log_metric`.
        """
        from dvclive.plots import Metric

        if step is not None:
            self.tracker.step = step
        for name, value in values.items():
            if Metric.could_log(value):
                self.tracker.log_metric(name, value, **kwargs)
            else:
                warn_left_out(self.name, "numbers and texts", name, type(value).__name__)
        self.tracker.next_step()

    @on_main_process
    def finish(self) -> None:
        self.tracker.end()
