"""Long saves, loads and exports show a bar on rank 0; each ends in a line with its size and speed."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tqdm.auto

from tests.checkpoint.resume import Run, Training
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint import consolidate, progress

DOING: dict[str, Callable[[Training, str], Any]] = {
    "checkpoint saved to": lambda run, folder: run.accelerator.save_state(f"{folder}/again"),
    "checkpoint loaded from": lambda run, folder: run.accelerator.load_state(f"{folder}/checkpoint"),
    "model saved to": lambda run, folder: run.accelerator.save_model(run.model, f"{folder}/model"),
    "weights written to": lambda run, folder: consolidate(f"{folder}/checkpoint", f"{folder}/weights"),
}


class Bar:
    """Keeps what a bar is told."""

    shown: ClassVar[list[Bar]] = []

    def __init__(self, total: int, desc: str, delay: float, **options: Any) -> None:
        self.total, self.desc, self.delay, self.updates = total, desc, delay, [0]
        self.shown.append(self)

    def update(self, done: int) -> None:
        self.updates.append(done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def bars(what: str, folder: str, stage: int | None) -> tuple[list[tuple[str, int, list[int], float]], list[str]]:
    """Bars and lines of an action."""
    training = Training(Run(stage, 1 if stage is None else 2, hidden=400))
    training.train(1)
    training.accelerator.save_state(f"{folder}/checkpoint")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, real = logging.getLogger(progress.__name__), tqdm.auto.tqdm
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    Bar.shown = []
    tqdm.auto.tqdm = Bar
    try:
        DOING[what](training, folder)
    finally:
        tqdm.auto.tqdm = real
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [(bar.desc, bar.total, bar.updates, bar.delay) for bar in Bar.shown], lines


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("what", DOING)
def test_rank_0_shows_how_far_it_is(ranks: RankPool, tmp_path: Path, what: str, stage: int) -> None:
    if what == "weights written to":
        (shown, lines), other = bars(what, str(tmp_path), None), ([], [])
    else:
        (shown, lines), other = ranks.run(bars, what=what, folder=str(tmp_path), stage=stage)
    desc, total, updates, delay = shown[-1]
    assert desc.startswith(what)
    assert total > 10**6
    assert 0.85 * total < sum(updates) < 1.15 * total
    assert len(updates) > 8
    assert delay == 2.0
    assert re.fullmatch(rf"{what} {tmp_path}/\w+: \d+\.\d+ [KM]B in \d+\.\d s, \d+(\.\d+)? [KMG]B/s", lines[-1]), lines
    assert other == ([], [])


def test_a_real_bar_appears_once_it_took_long(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.measured("something short", 100) as done:
        done(50)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    with progress.measured("something long", 100) as done:
        for _ in range(3):
            time.sleep(0.06)
            done(20)
        time.sleep(0.15)
        done(20)
    assert "something long" in capsys.readouterr().err
