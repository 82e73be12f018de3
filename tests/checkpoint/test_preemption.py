"""SIGTERM lets a run save at the end of its step and leave with a status of its own; the next one goes on there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.checkpoint.resume import Run, Training
from tests.commands.runs import ZEROACCEL_LAUNCH, ended, run, started
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint import PREEMPTED
from zeroaccel.errors import ConfigError

STEPS = 12
LAUNCH = (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2", str(Path(__file__).parent / "preempted.py"))


def launcher(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def one_rank(pid: int) -> None:
    os.kill(psutil.Process(pid).children()[1].pid, signal.SIGTERM)


def losses(folder: Path, rank: int = 0) -> list[str]:
    path = folder / f"losses{rank}"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody has told to end."""
    folder = tmp_path_factory.mktemp("whole")
    assert run((*LAUNCH, str(folder), str(STEPS)), folder).status == 0
    return folder


@pytest.mark.parametrize("told", [launcher, one_rank], ids=["the launcher is told", "one rank is told"])
def test_a_run_that_is_told_to_end_saves_and_the_next_one_goes_on(
    tmp_path: Path, whole: Path, told: Callable[[int], None]
) -> None:
    arguments = (str(tmp_path), str(STEPS))
    with started((*LAUNCH, *arguments), tmp_path, PAUSE="0.2") as process:
        limit = time.monotonic() + 60
        while len(losses(tmp_path)) < 2:
            assert time.monotonic() < limit, "no step"
            time.sleep(0.02)
        told(process.pid)
        first = ended(process, tmp_path)
    assert first.status == PREEMPTED == 143, first.err
    done = len(losses(tmp_path))
    assert done < STEPS
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_0"]
    assert run((*LAUNCH, *arguments), tmp_path).status == 0
    for rank in range(2):
        found, wanted = (
            {step: float(loss) for step, loss in map(str.split, losses(folder, rank))} for folder in (tmp_path, whole)
        )
        assert list(found) == list(wanted) == [str(step) for step in range(1, STEPS + 1)]
        assert found == pytest.approx(wanted, abs=1e-6)


def test_the_scripts_own_handler_is_called_too() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        accelerator = Training(Run(None, 1)).accelerator
        assert not accelerator.should_checkpoint()
        os.kill(os.getpid(), signal.SIGTERM)
        assert accelerator.should_checkpoint()
        assert accelerator.should_checkpoint()
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def inside_a_window() -> list[bool]:
    training = Training(Run(2, accumulation=2))
    accelerator = training.accelerator
    accelerator.should_checkpoint()
    if accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    answers = []
    for _ in range(2):
        with accelerator.accumulate(training.model):
            accelerator.backward(training.model(torch.ones(2, 24)).sum())
            training.optimizer.step()
        answers.append(accelerator.should_checkpoint())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return answers


def test_inside_an_accumulation_window_the_answer_waits_for_its_end(ranks: RankPool) -> None:
    assert ranks.run(inside_a_window) == [[False, True]] * 2


def test_the_newest_checkpoint_needs_numbers() -> None:
    with pytest.raises(ConfigError, match="automatic_checkpoint_naming=True"):
        Training(Run(None, 1)).accelerator.newest_checkpoint()
