"""What one rank cannot do, no rank has done: every rank hears of it, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zeroaccel.distributed.objects import all_objects
from zeroaccel.errors import CheckpointError, ConfigError, UnsupportedError, UsageError

Result = TypeVar("Result")

_KINDS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, UnsupportedError, UsageError)}


def together(work: Callable[[], Result], doing: str) -> list[Result]:
    """Has every rank do its part. Collective.

    Args:
        work: this rank's part; it must wait for no other rank.
        doing: what for, e.g. "saving into out".

    Returns:
        What it gave, in order of rank.

    Raises:
        CheckpointError: on every rank, if one of them failed; or what kind of error it raised, if it is one of ours.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = all_objects((result, None if failure is None else _described(failure)))
    problems = {rank: problem for rank, (_, problem) in enumerate(told) if problem is not None}
    if not problems:
        return [given for given, _ in told]
    kinds = {kind for kind, _ in problems.values()}
    texts = {text for _, text in problems.values()}
    kind = _KINDS.get(kinds.pop(), CheckpointError) if len(kinds) == 1 else CheckpointError
    if len(texts) == 1 and len(problems) == len(told):
        raise kind(f"{doing}: {texts.pop()}") from failure
    lines = "".join(f"\n  rank {rank}: {text}" for rank, (_, text) in problems.items())
    raise kind(f"{doing} failed{lines}") from failure


def _described(error: Exception) -> tuple[str, str]:
    kind = type(error).__name__
    return kind, str(error) if kind in _KINDS else f"{kind}: {error}"
