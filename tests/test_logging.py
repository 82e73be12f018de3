from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.distributed.pool import RankPool, reset_states
from zeroaccel.logging import get_logger
from zeroaccel.state import PartialState


class Records(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


def listen(name: str, level: int | None = None) -> Records:
    handler = Records()
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    if level is not None:
        logger.setLevel(level)
    return handler


# (method, keywords) -> the ranks that log
CALLS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0]),
    ({"main_process_only": True}, [0]),
    ({"main_process_only": False}, [0, 1]),
    ({"in_order": True}, [0, 1]),
    ({"main_process_only": False, "in_order": True}, [0, 1]),
]


def log_all() -> list[list[str]]:
    PartialState()
    logger = get_logger("of ranks")
    found = []
    for keywords, _ in CALLS:
        handler = listen("of ranks", logging.INFO)
        logger.info("%s of %s", 1, 2, **keywords)
        logger.debug("too low", **keywords)
        found.append(handler.texts)
    return found


def test_a_record_comes_from_the_ranks_that_the_call_names(ranks: RankPool) -> None:
    found = ranks.run(log_all)
    for rank, texts in enumerate(found):
        assert texts == [[f"[RANK {rank}] 1 of 2"] if rank in speakers else [] for _, speakers in CALLS]


def log_in_order_to_a_file(path: str) -> None:
    PartialState()
    logger = get_logger("to a file")
    handler = logging.FileHandler(path)
    logger.logger.handlers = [handler]
    for _ in range(5):
        logger.error("here", in_order=True)
    handler.close()


def test_ranks_log_one_after_the_other_in_order(ranks: RankPool, tmp_path: Any) -> None:
    path = tmp_path / "log.txt"
    ranks.run(log_in_order_to_a_file, path=str(path))
    assert path.read_text().splitlines() == ["[RANK 0] here", "[RANK 1] here"] * 5


def log_in_order_on_different_levels() -> list[str]:
    rank = PartialState().process_index
    handler = listen("levels", logging.ERROR if rank else logging.INFO)
    get_logger("levels").info("here", in_order=True)
    return handler.texts


def test_a_rank_that_is_too_quiet_to_log_still_takes_its_turn(ranks: RankPool) -> None:
    """In Accelerate the others wait for it for ever."""
    assert ranks.run(log_in_order_on_different_levels, timeout=20.0) == [["[RANK 0] here"], []]


@pytest.fixture
def state() -> PartialState:
    reset_states()
    return PartialState()


def test_a_logger_that_does_not_know_its_rank_yet_says_so() -> None:
    reset_states()
    with pytest.raises(RuntimeError, match=r"create `Accelerator\(\)` or `PartialState\(\)` first"):
        get_logger("early").info("too early")


def test_a_record_names_the_line_that_logged(state: PartialState) -> None:
    handler = listen("places", logging.INFO)
    get_logger("places").info("from here")
    assert handler.records[0].filename == "test_logging.py"
    assert handler.records[0].funcName == "test_a_record_names_the_line_that_logged"


def test_a_warning_can_be_given_once(state: PartialState) -> None:
    handler = listen("once")
    logger = get_logger("once")
    for number in (1, 1, 2):
        logger.warning_once("number %s", number)
    assert handler.texts == ["[RANK 0] number 1", "[RANK 0] number 2"]


@pytest.mark.parametrize(
    ("argument", "variable", "level"), [("debug", None, 10), (None, "ERROR", 40), ("INFO", "error", 20)]
)
def test_the_level_comes_from_the_argument_else_from_the_environment(
    argument: str | None, variable: str | None, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("ZEROACCEL_LOG_LEVEL", variable)
    root = logging.getLogger()
    before = root.level
    try:
        logger = get_logger("level", log_level=argument)
        assert (logger.logger.level, root.level) == (level, level)
    finally:
        root.setLevel(before)
