"""SIGKILL at random instants of a save: the newest complete checkpoint always loads, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.kills import Torture


@pytest.mark.parametrize(("stage", "numbered", "kills"), [(2, False, 3), (3, True, 2)], ids=["one-folder", "numbered"])
def test_a_save_that_is_killed_costs_at_most_itself(tmp_path: Path, stage: int, numbered: bool, kills: int) -> None:
    torture = Torture(str(tmp_path), stage, numbered)
    outcomes = [torture.attempt() for _ in range(kills + 1)]
    assert outcomes[0] == "first"
    assert set(outcomes[1:]) <= {"old", "new"}


@pytest.mark.full
@pytest.mark.parametrize("numbered", [False, True], ids=["one-folder", "numbered"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_many_kills(tmp_path: Path, stage: int, numbered: bool) -> None:
    torture = Torture(str(tmp_path), stage, numbered, seed=stage)
    for _ in range(14):
        torture.attempt()
