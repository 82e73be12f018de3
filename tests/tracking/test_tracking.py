"""Trackers in a run: who logs on which rank, real event files of TensorBoard, trackers of one's own."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock, call

import accelerate
import accelerate.tracking
import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.pool import RankPool
from zeroaccel import Accelerator, DeepSpeedPlugin
from zeroaccel.errors import ConfigError
from zeroaccel.state import AcceleratorState, GradientState, PartialState
from zeroaccel.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    TensorBoardTracker,
    filter_trackers,
    get_available_trackers,
    on_main_process,
    register,
    register_tracker_class,
)
from zeroaccel.utils import LoggerType, ProjectConfiguration

CONFIG = {"iterations": 12, "lr": 1e-2, "flag": False, "text": "some"}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class ListTracker(GeneralTracker):
    """Notes what it is told, on the rank on which it is told."""

    name = "list"
    requires_logging_directory = False

    def __init__(self, run_name: str = "", **kwargs: Any) -> None:
        super().__init__()
        self.told: list[Any] = [(run_name, kwargs)]

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append(("log", values, step, kwargs))

    def finish(self) -> None:
        self.told.append("finish")


class CsvTracker(GeneralTracker):
    """Writes rows of a file, from rank 0."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, suffix: str = "") -> None:
        super().__init__()
        self.path = Path(logging_dir, f"{run_name}{suffix}.csv")

    @on_main_process
    def start(self) -> None:
        self.file = self.path.open("w")
        self.writer = csv.writer(self.file)

    @property
    def tracker(self) -> Any:
        return self.writer

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.writer.writerow([step, *values.values()])

    @on_main_process
    def finish(self) -> None:
        self.file.close()


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(LOGGER_TYPE_TO_CLASS)
    register_tracker_class(ListTracker)
    register_tracker_class(CsvTracker)
    yield
    LOGGER_TYPE_TO_CLASS.clear()
    LOGGER_TYPE_TO_CLASS.update(before)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_writes_scalars_texts_images_and_hyperparameters(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("project", CONFIG)
    for step in range(3):
        accelerator.log({"loss": 1.0 / (step + 1), "phase": "warm-up", "norms": {"a": 1.0, "b": 2.0}}, step=step)
    pictures = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    accelerator.get_tracker("tensorboard").log_images({"pictures": pictures}, step=1)
    accelerator.get_tracker("tensorboard", unwrap=True).add_scalar("by hand", 7.0, 5)
    accelerator.end_training()
    found = events(tmp_path / "project")
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]
    assert found.Scalars("by hand")[0].value == 7.0
    assert found.Tensors("phase/text_summary")[0].tensor_proto.string_val == [b"warm-up"]
    assert found.Images("pictures")[0].step == 1
    assert events(tmp_path / "project" / "norms_b").Scalars("norms")[2].value == 2.0
    (file,) = (tmp_path / "project").glob("*/hparams.yml")
    assert yaml.safe_load(file.read_text()) == CONFIG


def test_scalars_of_numpy_and_pytorch_are_numbers_and_what_is_left_out_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("project")
    with caplog.at_level(logging.WARNING):
        accelerator.log({"tensor": torch.tensor(0.5), "array": np.float32(0.25), "count": np.int64(3)}, step=0)
        for step in range(3):
            accelerator.log({"several": torch.ones(2)}, step=step)
    accelerator.end_training()
    found = events(tmp_path / "project")
    assert [found.Scalars(name)[0].value for name in ("tensor", "array", "count")] == [0.5, 0.25, 3.0]
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("zeroaccel")]
    assert told == "tensorboard takes numbers and texts, so 'several', a Tensor, is not logged"


SCALARS = {
    "comet_ml": ("log_metric", [call("loss", 0.5, step=1)]),
    "mlflow": ("log_metrics", [call({"loss": 0.5}, step=1)]),
    "clearml": ("report_scalar", [call(title="loss", series="train", value=0.5, iteration=1)]),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_loss_that_is_a_tensor_is_logged_as_its_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = MagicMock(name="tool", __version__="3.50.0")
    monkeypatch.setitem(sys.modules, name, tool)
    PartialState(cpu=True)
    tracker = LOGGER_TYPE_TO_CLASS[name]("project")
    tracker.start()
    tracker.log({"loss": torch.tensor(0.5)}, step=1)
    method, expected = SCALARS[name]
    logger = {"comet_ml": tool.start(), "mlflow": tool, "clearml": tool.Task.current_task().get_logger()}[name]
    assert getattr(logger, method).mock_calls == expected


def test_the_logging_dir_is_where_logs_go(tmp_path: Path) -> None:
    places = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, log_with=LoggerType.TENSORBOARD, project_config=places)
    accelerator.init_trackers("project", init_kwargs={"tensorboard": {"filename_suffix": ".mine"}})
    accelerator.log({"loss": 1.0}, step=0, log_kwargs={"tensorboard": {"walltime": 3.0}})
    accelerator.end_training()
    assert list((tmp_path / "logs" / "project").glob("events.out.tfevents.*.mine"))
    assert events(tmp_path / "logs" / "project").Scalars("loss")[0].wall_time == 3.0


def test_a_tracker_of_ones_own_hears_everything() -> None:
    own = ListTracker("given")
    accelerator = Accelerator(cpu=True, log_with=[own])
    assert accelerator.log_with == [own]
    assert accelerator.trackers == []
    accelerator.init_trackers("ignored", CONFIG, init_kwargs={"list": {"ignored": 1}})
    accelerator.log({"loss": 1.0}, step=3, log_kwargs={"list": {"more": 2}, "wandb": {"other": 1}})
    assert accelerator.get_tracker("list") is own
    assert accelerator.get_tracker("list", unwrap=True) is own.told
    accelerator.free_memory()
    accelerator.log({"after": 1})
    accelerator.end_training()
    assert own.told == [
        ("given", {}),
        "start",
        ("config", CONFIG),
        ("log", {"loss": 1.0}, 3, {"more": 2}),
        ("log", {"after": 1}, None, {}),
        "finish",
    ]


def test_a_registered_class_is_known_by_its_name(registered: None, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=["list", "csv"], project_dir=tmp_path)
    accelerator.init_trackers("run", init_kwargs={"list": {"a": 1}, "csv": {"suffix": "-x"}})
    accelerator.log({"loss": 0.5}, step=2)
    accelerator.end_training()
    assert accelerator.get_tracker("list", unwrap=True)[0] == ("run", {"a": 1})
    assert (tmp_path / "run-x.csv").read_text() == "2,0.5\n"


def test_registering_another_class_of_a_name_warns(registered: None) -> None:
    register_tracker_class(ListTracker)  # the same once more is silent
    other = type("Other", (ListTracker,), {})
    with pytest.warns(UserWarning, match="tracker 'list' is Other from now on"):
        register_tracker_class(other)
    assert LOGGER_TYPE_TO_CLASS["list"] is other


NOT_REGISTERED: list[tuple[Any, str]] = [
    (int, "takes a subclass of GeneralTracker, got <class 'int'>"),
    (ListTracker(), "takes a subclass of GeneralTracker, got <"),
    (type("Nameless", (GeneralTracker,), {"requires_logging_directory": True}), "Nameless needs a name"),
    (type("Open", (GeneralTracker,), {"name": "open"}), "requires_logging_directory"),
]


@pytest.mark.parametrize(("given", "message"), NOT_REGISTERED)
def test_what_is_no_tracker_class_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_tracker_class(given)


def test_an_unfinished_tracker_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="Unfinished is no tracker yet: define requires_logging_directory, t"):
        type("Unfinished", (GeneralTracker,), {"name": "x"})()


def test_only_installed_trackers_are_kept_and_the_others_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(register._INSTALLED, "wandb", lambda: False)
    own = ListTracker()
    with caplog.at_level(logging.WARNING):
        assert filter_trackers(["wandb", "tensorboard", own, "tensorboard"], "logs") == ["tensorboard", own]
        assert filter_trackers("wandb") == []
    left_out = "wandb is not installed: log_with leaves it out"
    nothing = "log_with='wandb': nothing is logged, as no tracker is there"
    assert [record.getMessage() for record in caplog.records] == [left_out, left_out, nothing]


def test_all_are_those_that_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in register._INSTALLED:
        monkeypatch.setitem(register._INSTALLED, name, lambda name=name: name in ("tensorboard", "mlflow"))
    assert get_available_trackers() == [LoggerType.TENSORBOARD, LoggerType.MLFLOW]
    assert filter_trackers("all", tmp_path) == ["tensorboard", "mlflow"]
    own = ListTracker()
    assert filter_trackers(["all", "mlflow", own], tmp_path) == [own, "tensorboard", "mlflow"]
    assert filter_trackers(None) == []
    assert not caplog.records
    assert filter_trackers("all") == ["mlflow"]
    told = "log_with='all' leaves tensorboard out, which needs Accelerator(project_dir=...)"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_tracker_that_an_integration_derives_from_accelerates_base_runs() -> None:
    class Foreign(accelerate.tracking.GeneralTracker):
        name = "foreign"
        requires_logging_directory = False
        tracker: ClassVar[list[Any]] = []

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.tracker.append((values, step))

    accelerator = Accelerator(cpu=True, log_with=Foreign())
    accelerator.init_trackers("project", CONFIG)
    accelerator.log({"loss": 1.0}, step=2)
    accelerator.end_training()
    assert accelerator.get_tracker("foreign", unwrap=True) == [({"loss": 1.0}, 2)]


def test_a_second_init_adds_a_run_and_starts_an_object_once(registered: None) -> None:
    own = ListTracker("own")
    accelerator = Accelerator(cpu=True, log_with=["list", own])
    accelerator.init_trackers("first")
    appended = ListTracker("appended")
    accelerator.trackers.append(appended)
    accelerator.init_trackers("second", CONFIG)
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    log = ("log", {"loss": 1.0}, 1, {})
    assert [tracker.told for tracker in accelerator.trackers] == [
        [("first", {}), "start", log, "finish"],
        [("own", {}), "start", log, "finish"],
        [("appended", {}), log, "finish"],
        [("second", {}), "start", ("config", CONFIG), log, "finish"],
    ]


def test_a_run_after_the_end_of_another_has_trackers_of_its_own(registered: None) -> None:
    own = ListTracker("own")
    accelerator = Accelerator(cpu=True, log_with=["list", own])
    ended = []
    for name in ("first", "second"):
        accelerator.init_trackers(name)
        accelerator.log({"run": name})
        accelerator.end_training()
        ended.append(accelerator.get_tracker("list"))
    assert [tracker.told for tracker in ended] == [
        [(name, {}), "start", ("log", {"run": name}, None, {}), "finish"] for name in ("first", "second")
    ]
    assert own.told.count("start") == own.told.count("finish") == 2


def test_trackers_that_compare_by_value_are_told_apart() -> None:
    @dataclass
    class Same(GeneralTracker):
        name = "same"
        requires_logging_directory = False
        tracker: int = 0

        def start(self) -> None:
            self.tracker += 1

    first, second = Same(), Same()
    accelerator = Accelerator(cpu=True, log_with=[first, second])
    accelerator.init_trackers("project")
    assert [first.tracker, second.tracker] == [1, 1]


def test_trackers_go_on_after_one_that_cannot_start_and_end_after_one_that_cannot_end() -> None:
    class Broken(ListTracker):
        name = "broken"

        def start(self) -> None:
            raise ConnectionError("no network")

        def finish(self) -> None:
            raise OSError("disk full")

    first, broken, last = ListTracker(), Broken(), ListTracker()
    accelerator = Accelerator(cpu=True, log_with=[first, broken, last])
    with pytest.raises(ConnectionError):
        accelerator.init_trackers("project")
    accelerator.log({"loss": 1.0})
    accelerator.trackers.insert(0, broken)
    with pytest.raises(OSError, match="disk full"):
        accelerator.end_training()
    assert first.told[1:] == ["start", ("log", {"loss": 1.0}, None, {}), "finish"]
    assert last.told[1:] == []


def test_hyperparameters_of_numpy_and_enumerations_are_in_the_file(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    given = {"lr": np.float64(0.5), "n": np.int64(3), "m": torch.tensor(2), "kind": LoggerType.WANDB, "none": None}
    accelerator.init_trackers("project", given)
    accelerator.end_training()
    (file,) = (tmp_path / "project").glob("*/hparams.yml")
    assert yaml.safe_load(file.read_text()) == {"lr": 0.5, "n": 3, "m": 2, "kind": "wandb", "none": None}


REFUSED: list[tuple[Any, str]] = [
    ("tensorbord", "log_with='tensorbord' is no tracker: choose from 'all', 'aim'"),
    (ListTracker, "is no tracker: .*or pass a GeneralTracker object"),
    (3, "log_with=3 is no tracker"),
    (["tensorboard"], "log_with='tensorboard' writes files, and there is no folder for them"),
]


@pytest.mark.parametrize(("log_with", "message"), REFUSED)
def test_trackers_that_cannot_work_are_refused_at_once(log_with: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Accelerator(cpu=True, log_with=log_with)


def test_a_name_that_is_not_running_is_an_error_and_without_trackers_nothing_happens() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.init_trackers("project", CONFIG)
    accelerator.log({"loss": 1.0})
    assert type(accelerator.get_tracker("wandb")) is GeneralTracker
    other = Accelerator(cpu=True, log_with=ListTracker())
    other.init_trackers("project")
    with pytest.raises(ConfigError, match=r"get_tracker\('wandb'\): there is none of this name, but 'list'"):
        other.get_tracker("wandb")


def train_and_log(folder: str) -> dict[str, Any]:
    """A short run on two ranks with two trackers."""
    accelerator = Accelerator(
        cpu=True,
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=2),
        log_with=[ListTracker(), "tensorboard"],
        project_dir=folder,
    )
    model = torch.nn.Linear(4, 1)
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2),
    )
    accelerator.init_trackers("project", {"lr": 0.1})
    for step, batch in enumerate(loader):
        loss = model(batch).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
    tracker = accelerator.get_tracker("tensorboard")
    tracker.log({"extra": 1.0}, step=0)
    found = {
        "running": [each.name for each in accelerator.trackers],
        "tracker": type(tracker).__name__,
        "unwrapped": type(accelerator.get_tracker("tensorboard", unwrap=True)).__name__,
        "told": [len(each.told) for each in accelerator.log_with if isinstance(each, ListTracker)],
    }
    appended = ListTracker()
    accelerator.trackers.append(appended)
    accelerator.log({"loss": 0.0}, step=9)
    found["appended"] = len(appended.told)
    accelerator.wait_for_everyone()
    for each in accelerator.trackers:
        each.finish()
    return found


def test_rank_0_tracks_and_the_others_get_trackers_that_do_nothing(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(train_and_log, folder=str(tmp_path))
    assert first == {
        "running": ["list", "tensorboard"],
        "tracker": "TensorBoardTracker",
        "unwrapped": "SummaryWriter",
        "told": [5],
        "appended": 2,
    }
    null = {"tracker": "GeneralTracker", "unwrapped": "GeneralTracker"}
    assert second == {"running": [], **null, "told": [1], "appended": 1}
    assert [event.step for event in events(tmp_path / "project").Scalars("loss")] == [0, 1, 9]


def decorated(folder: str) -> list[bool]:
    """A tracker that every rank makes by itself."""
    PartialState(cpu=True)
    tracker = TensorBoardTracker("project", folder)
    found = []
    for main_process_only in (True, False):
        tracker.main_process_only = main_process_only
        tracker.start()
        found.append(hasattr(tracker, "writer"))
    return found


def test_methods_for_the_main_process_run_there_unless_the_tracker_wants_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(decorated, folder=str(tmp_path)) == [[True, True], [False, True]]
