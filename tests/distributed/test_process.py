"""The barrier and the progress bar as functions, on two ranks and on one."""

from __future__ import annotations

import contextlib
import io
import time

import pytest

from tests.distributed.pool import RankPool
from zeroaccel.distributed.process import deepspeed_required, tqdm, wait_for_everyone
from zeroaccel.errors import ConfigError, ConfigTypeError
from zeroaccel.state import AcceleratorState, PartialState


def _shown_bars() -> list[bool]:
    PartialState()
    shown = []
    for options in ({}, {"main_process_only": False}, {"disable": True}, {"main_process_only": False, "disable": True}):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            assert list(tqdm(range(3), **options)) == [0, 1, 2]
        shown.append("3/3" in printed.getvalue())
    return shown


def test_a_progress_bar_shows_on_the_first_rank_unless_asked_otherwise(ranks: RankPool) -> None:
    assert ranks.run(_shown_bars) == [[True, True, False, False], [False, True, False, False]]


def test_a_progress_bar_refuses_a_flag_where_the_items_belong() -> None:
    with pytest.raises(ConfigTypeError, match=r"write `tqdm\(items, main_process_only=True\)`"):
        tqdm(True, range(3))


def _arrive(late: float) -> float:
    if PartialState().process_index == 1:
        time.sleep(late)
    begin = time.monotonic()
    wait_for_everyone()
    return time.monotonic() - begin


def test_everyone_waits_for_the_last_rank(ranks: RankPool) -> None:
    waited = ranks.run(_arrive, late=0.3)
    assert waited[0] > 0.2 > waited[1]


def test_deepspeed_is_required_once_an_accelerator_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @deepspeed_required
    def gather_shards(rank: int) -> int:
        return rank

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert gather_shards(1) == 1
    AcceleratorState(cpu=True, _from_accelerator=True)
    with pytest.raises(ConfigError, match="gather_shards needs DeepSpeed"):
        gather_shards(1)
    PartialState._reset_state()
