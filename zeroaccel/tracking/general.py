"""What every tracker can do, and the null one that stands for it on ranks that do not track."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)

_REQUIRED = ("name", "requires_logging_directory", "tracker")


def on_main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a tracker's methods: on rank 0 only, unless the tracker has `main_process_only = False`."""

    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", False) and not PartialState().is_main_process:
            return None
        return function(self, *args, **kwargs)

    return run


def plain(value: Any) -> Any:
    """A number for a tensor or array of one element and no dimension, or what was given."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


@functools.cache
def warn_left_out(tool: str, takes: str, name: str, kind: str) -> None:
    """Says once that a tool does not take what was given under this name."""
    logger.warning("%s takes %s, so %r, a %s, is not logged", tool, takes, name, kind)


def taken(tool: str, takes: str, values: dict[str, Any], kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Names and values of these kinds, numbers of NumPy and PyTorch as Python's; what is left out is told once.

    Args:
        tool: which takes them.
        takes: what it takes, in words.
        values: by name.
        kinds: the same as classes.
    """
    for name, given in values.items():
        value = plain(given)
        if isinstance(value, kinds):
            yield name, value
        else:
            warn_left_out(tool, takes, name, type(value).__name__)


class GeneralTracker:
    """Base of all trackers, of your own ones too: `Accelerator(log_with=MyTracker(...))`.

    A tracker defines `name`, `requires_logging_directory` and a property `tracker`, the tool's own run object; and
    overrides the methods below.

    Args:
        _blank: make the null tracker, which does nothing.

    Attributes:
        main_process_only: what `@on_main_process` does with this tracker's methods.

    Raises:
        NotImplementedError: the class lacks one of the three.
    """

    main_process_only = True

    def __init__(self, _blank: bool = False) -> None:
        missing = [name for name in _REQUIRED if not hasattr(type(self), name) and name not in vars(self)]
        if missing and not _blank:
            raise NotImplementedError(f"{type(self).__name__} is no tracker yet: define {', '.join(missing)} in it")

    def start(self) -> None:
        """Begins the run; called by `Accelerator.init_trackers`, where the process group exists."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Notes hyperparameters.

        Args:
            values: by name; what they may be is the tool's affair: bool, str, float, int are understood by all.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Notes values of the running experiment.

        Args:
            values: by name.
            step: number of the step that they belong to.
            kwargs: for the tool's own function.
        """

    def finish(self) -> None:
        """Ends the run; called by `Accelerator.end_training`."""
