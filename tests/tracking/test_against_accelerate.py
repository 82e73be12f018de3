"""Every tracker calls its tool as Accelerate's does: both talk to recorders in the place of the tools' packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import accelerate
import pytest

import zeroaccel

# Tracker -> modules that it imports.
MODULES = {
    "aim": ["aim"],
    "comet_ml": ["comet_ml"],
    "mlflow": ["mlflow"],
    "tensorboard": ["torch.utils.tensorboard"],
    "wandb": ["wandb"],
    "clearml": ["clearml"],
    "dvclive": ["dvclive", "dvclive.plots"],
    "swanlab": ["swanlab"],
    "trackio": ["trackio"],
}

# What scripts and subclasses read from a tracker that runs.
ATTRIBUTES = {
    "aim": "run_name aim_repo_path init_kwargs writer",
    "comet_ml": "run_name init_kwargs writer",
    "mlflow": "experiment_name logging_dir run_id tags nested_run run_name description active_run",
    "tensorboard": "run_name logging_dir_param init_kwargs logging_dir writer",
    "wandb": "run_name init_kwargs run",
    "clearml": "user_provided_run_name init_kwargs task",
    "dvclive": "live init_kwargs",
    "swanlab": "run_name init_kwargs run",
    "trackio": "run_name init_kwargs run",
}

CONFIG = {"lr": 1e-3, "n": 3, "text": "some", "flag": True, "nested": {"a": 1}, "none": None, "long": "x" * 600}
VALUES = {"loss": 0.5, "count": 1, "flag": True, "name": "epoch", "group": {"x": 1.0}, "eval_loss": 0.25, "list": [1]}
# Calls of a tracker's methods, where it has them: name, arguments.
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("start", (), {}),
    ("store_init_configuration", (CONFIG,), {}),
    ("store_init_configuration", ({f"p{number}": number for number in range(250)},), {}),
    ("log", (VALUES,), {"step": 4}),
    ("log", ({"train_loss": 0.25, "test_acc": 1, "a/b": 2.0},), {}),
    ("log", ({"loss": 0.5, "name": "x"},), {"step": 5, "extra": "given"}),
    ("log_images", ({"eval_pictures": ["one", "two"], "more": ["three"]},), {"step": 2}),
    ("log_table", ("train_table", ["a", "b"], [[1, 2], [3, 4]]), {"step": 3}),
    ("log_table", ("rows",), {"data": [[1, 2], [3, 4]]}),
    ("log_table", ("table",), {"dataframe": "frame"}),
    ("log_figure", ("figure", "file.png"), {"dpi": 100}),
    ("log_artifact", ("path",), {"artifact_path": "where"}),
    ("log_artifacts", ("folder",), {}),
    ("finish", (), {}),
]


def recorder() -> MagicMock:
    """All packages in one, so that the order of calls shows; with the constants that trackers read."""
    tool = MagicMock(name="tool")
    tool.comet_ml.__version__ = "3.50.0"
    tool.mlflow.utils.validation.MAX_PARAM_VAL_LENGTH = 500
    tool.mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 100
    tool.plots.Metric.could_log.side_effect = lambda value: isinstance(value, (int, float))
    return tool


def calls(tool: MagicMock) -> list[str]:
    """What the tool was asked to do; nobody cares how often a result was compared, or about the framework's name."""
    own = [str(call) for call in tool.mock_calls]
    return [
        call.replace("🤗Accelerate", "zeroaccel")
        for call in own
        if not any(f".__{asked}__(" in call for asked in ("bool", "len", "iter", "gt", "lt"))
    ]


def played(
    package: Any, name: str, monkeypatch: pytest.MonkeyPatch, tool: MagicMock, folder: Path, **kwargs: Any
) -> list[str]:
    """What a package's tracker does with the tool in all of `CALLS`."""
    package.PartialState(cpu=True)
    for module in MODULES[name]:
        monkeypatch.setitem(sys.modules, module, getattr(tool, module.rpartition(".")[2]))
        if module == "torch.utils.tensorboard":
            monkeypatch.setattr("torch.utils.tensorboard", tool.tensorboard, raising=False)
    tracking = importlib.import_module(f"{package.__name__}.tracking")
    tracker_class = tracking.LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        kwargs["logging_dir"] = str(folder)
    tracker = tracker_class("project", **kwargs)
    for method, arguments, options in CALLS:
        if hasattr(tracker, method):
            if name == "aim" and method == "log_images":
                options = options | {"kwargs": {"aim_image": {"quality": 9}, "track": {"context": "c"}}}
            getattr(tracker, method)(*arguments, **options)
    assert isinstance(tracker.tracker, MagicMock)
    assert {*ATTRIBUTES[name].split()} <= {*vars(tracker)}
    return calls(tool)


def recorder_as_it_is(tool: MagicMock) -> None:
    """Nothing to prepare."""


def without_ids(call: str) -> str:
    """The results of recorders are shown with an address."""
    head, *rest = call.split(" id='")
    return head + "".join(part.partition("'")[2] for part in rest)


def compare(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    prepare: Callable[[MagicMock], object] = recorder_as_it_is,
    **kwargs: Any,
) -> list[str]:
    both = []
    for package in (accelerate, zeroaccel):
        tool = recorder()
        prepare(tool)
        both.append([without_ids(call) for call in played(package, name, monkeypatch, tool, folder, **kwargs)])
    theirs, ours = both
    assert ours == theirs
    return ours


@pytest.mark.parametrize("name", MODULES)
def test_trackers_call_their_tools_as_accelerates_do(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(compare(name, monkeypatch, tmp_path)) >= 6


def version(number: str) -> Callable[[MagicMock], object]:
    return lambda tool: setattr(tool.comet_ml, "__version__", number)


def experiments(*ids: str) -> Callable[[MagicMock], object]:
    found = [SimpleNamespace(experiment_id=each) for each in ids]
    return lambda tool: setattr(tool.mlflow.search_experiments, "return_value", found)


def no_task(tool: MagicMock) -> None:
    tool.clearml.Task.current_task.return_value = None


MLFLOW = {
    "MLFLOW_EXPERIMENT_NAME": "from the environment",
    "MLFLOW_RUN_ID": "7",
    "MLFLOW_TAGS": '{"team": "a"}',
    "MLFLOW_NESTED_RUN": "true",
}
GIVEN = {"run_id": "1", "tags": {"given": "x"}, "run_name": "name", "description": "words", "logging_dir": "where"}
# Tracker, what its tool finds, its arguments, environment variables, a call that must be among the others.
CIRCUMSTANCES: dict[str, tuple[str, Callable[[MagicMock], object], dict[str, Any], dict[str, str], str]] = {
    "wandb with arguments": ("wandb", recorder_as_it_is, {"tags": ["a"]}, {}, "init(project='project', tags=['a'])"),
    "comet before start()": ("comet_ml", version("3.40.9"), {"a": 1}, {}, "Experiment(project_name='project', a=1)"),
    "comet since start()": ("comet_ml", version("3.41.0"), {"a": 1}, {}, "start(project_name='project', a=1)"),
    "a new mlflow experiment": ("mlflow", experiments(), GIVEN, {}, "create_experiment("),
    "an old mlflow experiment": ("mlflow", experiments("a", "b"), GIVEN, {}, "experiment_id='a'"),
    "mlflow tags as JSON": ("mlflow", experiments(), {"tags": '{"a": "b"}'}, {}, "tags={'a': 'b'}"),
    "mlflow by environment": ("mlflow", experiments(), GIVEN, MLFLOW, "run_id='7'"),
    "a nested mlflow run": ("mlflow", experiments(), {"nested_run": True}, {}, "nested=True"),
    "a new clearml task": ("clearml", no_task, {}, {}, "close()"),
    "clearml by environment": (
        "clearml",
        no_task,
        {},
        {"CLEARML_PROJECT": "p", "CLEARML_TASK": "t"},
        "project_name='p', task_name='t'",
    ),
    "clearml with arguments": ("clearml", no_task, {"task_name": "x", "tags": ["a"]}, {}, "task_name='x'"),
    "dvclive with arguments": ("dvclive", recorder_as_it_is, {"dir": "d"}, {}, "Live(dir='d')"),
    "swanlab with arguments": ("swanlab", recorder_as_it_is, {"mode": "local"}, {}, "mode='local'"),
    "trackio with arguments": ("trackio", recorder_as_it_is, {"space_id": "s"}, {}, "space_id='s'"),
    "aim with arguments": ("aim", recorder_as_it_is, {"experiment": "e"}, {}, "experiment='e'"),
    "tensorboard with arguments": ("tensorboard", recorder_as_it_is, {"flush_secs": 9}, {}, "flush_secs=9"),
}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_circumstances_and_arguments_count_as_in_accelerate(
    circumstance: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, prepare, kwargs, variables, expected = CIRCUMSTANCES[circumstance]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert any(expected in call for call in compare(name, monkeypatch, tmp_path, prepare, **kwargs))


def test_a_live_object_that_exists_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = {}
    for package in (accelerate, zeroaccel):
        live = MagicMock()
        assert not any(
            "Live(" in call for call in played(package, "dvclive", monkeypatch, recorder(), tmp_path, live=live)
        )
        both[package] = [*map(str, live.mock_calls), live.step]
    assert both[zeroaccel] == both[accelerate]
    assert both[zeroaccel][-1] == 5
