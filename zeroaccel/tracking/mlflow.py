"""MLflow."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

from zeroaccel.config import environment
from zeroaccel.logging import library_logger
from zeroaccel.tracking.general import GeneralTracker, on_main_process, taken

logger = library_logger(__name__)


class MLflowTracker(GeneralTracker):
    """A run of MLflow. `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_RUN_ID`, `MLFLOW_TAGS`, `MLFLOW_NESTED_RUN` beat arguments.

    Args:
        experiment_name: experiment; is created where there is none of that name.
        logging_dir: where a new experiment keeps its artifacts.
        run_id: a run to go on with.
        tags: of the run, as a dictionary or as JSON.
        nested_run: make it a child of the active run.
        run_name: its name.
        description: its description.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool | None = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.experiment_name = environment.of_another_tool("MLFLOW_EXPERIMENT_NAME") or experiment_name
        self.logging_dir = logging_dir
        self.run_id = environment.of_another_tool("MLFLOW_RUN_ID") or run_id
        tags = environment.of_another_tool("MLFLOW_TAGS") or tags
        self.tags = json.loads(tags) if isinstance(tags, str) else tags
        nested = environment.of_another_tool("MLFLOW_NESTED_RUN")
        self.nested_run = nested_run if nested is None else environment.parse_bool(nested, "MLFLOW_NESTED_RUN")
        self.run_name = run_name
        self.description = description

    @on_main_process
    def start(self) -> None:
        import mlflow

        self.active_run = mlflow.start_run(
            run_id=self.run_id,
            experiment_id=self._experiment(),
            run_name=self.run_name,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )

    def _experiment(self) -> Any:
        """Id of the experiment, which is created if need be."""
        import mlflow

        found = mlflow.search_experiments(filter_string=f"name = '{self.experiment_name}'")
        if len(found) > 1:
            logger.warning(
                "mlflow has %d experiments called %r: the first one is used", len(found), self.experiment_name
            )
        if len(found) > 0:
            return found[0].experiment_id
        return mlflow.create_experiment(name=self.experiment_name, artifact_location=self.logging_dir, tags=self.tags)

    @property
    def tracker(self) -> Any:
        """MLflow's active run."""
        return self.active_run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Notes hyperparameters; one whose text is longer than MLflow allows is left out with a warning."""
        import mlflow

        limits = mlflow.utils.validation
        kept = []
        for name, value in values.items():
            if len(str(value)) > limits.MAX_PARAM_VAL_LENGTH:
                longest = limits.MAX_PARAM_VAL_LENGTH
                logger.warning("mlflow takes at most %d characters, so %r is not logged", longest, name)
            else:
                kept.append((name, value))
        remaining = iter(kept)
        while batch := dict(itertools.islice(remaining, limits.MAX_PARAMS_TAGS_PER_BATCH)):
            mlflow.log_params(batch)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes numbers; what is none is left out with a warning.

        Args:
            values: by name.
            step: number of the step that they belong to.
            kwargs: for `mlflow.log_metrics`.
        """
        import mlflow

        numbers = dict(taken(self.name, "numbers", values, (int, float)))
        mlflow.log_metrics(numbers, step=step, **kwargs)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Keeps a figure.

        Args:
            figure: of matplotlib or plotly.
            artifact_file: path among the run's artifacts.
            save_kwargs: for `mlflow.log_figure`.
        """
        import mlflow

        mlflow.log_figure(figure=figure, artifact_file=artifact_file, **save_kwargs)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Keeps all files of a folder.

        Args:
            local_dir: the folder.
            artifact_path: where among the run's artifacts.
        """
        import mlflow

        mlflow.log_artifacts(local_dir=local_dir, artifact_path=artifact_path)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Keeps a file.

        Args:
            local_path: the file.
            artifact_path: where among the run's artifacts.
        """
        import mlflow

        mlflow.log_artifact(local_path=local_path, artifact_path=artifact_path)

    @on_main_process
    def finish(self) -> None:
        import mlflow

        mlflow.end_run()
