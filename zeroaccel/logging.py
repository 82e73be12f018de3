"""Loggers that know their rank. The first state that is created tells this module who we are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from zeroaccel.config import environment


class Ranks(Protocol):
    """What a logger asks of the process state."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    @property
    def is_main_process(self) -> bool: ...

    def wait_for_everyone(self) -> None: ...


_current_ranks: Callable[[], Ranks | None] = lambda: None  # noqa: E731


def set_rank_source(source: Callable[[], Ranks | None]) -> None:
    """Registers the function that returns the process state, or None before there is one."""
    global _current_ranks
    _current_ranks = source


class MultiProcessAdapter(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records come from the main process only, unless the call says otherwise.

    `log` and its shorthands take two more keywords: `main_process_only` (default True), and `in_order`
    (default False): every rank logs, one after the other, in the order of their ranks.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Puts the rank before the message."""
        msg, kwargs = super().process(msg, kwargs)
        kwargs.setdefault("stacklevel", 2)
        ranks = _current_ranks()
        return (msg if ranks is None else f"[RANK {ranks.process_index}] {msg}"), kwargs

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Logs on the main process, on all, or on all in order.

        Raises:
            RuntimeError: no `PartialState` or `Accelerator` exists yet, so the rank is unknown.
        """
        ranks = _current_ranks()
        if ranks is None:
            raise RuntimeError(
                "this logger was used before the rank is known: create `Accelerator()` or `PartialState()` first"
            )
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        text, options = self.process(msg, kwargs)
        if in_order:
            # Whatever the level: it may differ over the ranks, and all of them must come to each barrier.
            for rank in range(ranks.num_processes):
                if rank == ranks.process_index:
                    self.logger.log(level, text, *args, **options)
                ranks.wait_for_everyone()
        elif ranks.is_main_process or not main_process_only:
            self.logger.log(level, text, *args, **options)

    @functools.cache  # noqa: B019  (loggers live as long as the process)
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """`warning`, but the same arguments are logged only once."""
        self.warning(*args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """A logger for `name` that knows the ranks.

    Args:
        name: name of the logger, usually `__name__`.
        log_level: sets this logger's and the root logger's level; default: `ZEROACCEL_LOG_LEVEL`, else unchanged.
    """
    if log_level is None:
        log_level = environment.text("LOG_LEVEL")
    logger = logging.getLogger(name)
    if log_level is not None:
        logger.setLevel(log_level.upper())
        logger.root.setLevel(log_level.upper())
    return MultiProcessAdapter(logger, {})


def library_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """The library's own loggers: the main process speaks, and before a state exists everyone does."""
    return _LibraryAdapter(logging.getLogger(name), {})


class _LibraryAdapter(logging.LoggerAdapter[logging.Logger]):
    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        ranks = _current_ranks()
        if ranks is None or ranks.is_main_process:
            self.logger.log(level, msg, *args, **kwargs)
