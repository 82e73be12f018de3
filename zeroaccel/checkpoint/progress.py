"""How far a long save, load or export is, and how fast it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zeroaccel.config.generic import convert_bytes
from zeroaccel.config.packages import is_tqdm_available
from zeroaccel.logging import library_logger

logger = library_logger(__name__)

_PATIENCE = 2.0  # seconds without a bar


@contextmanager
def measured(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told the bytes done; logs size and throughput at the end.

    Args:
        what: e.g. "model saved to out".
        total: bytes in all.
        shown: whether this rank shows the bar, if it takes over two seconds, and logs.
    """
    start = time.perf_counter()
    if shown and is_tqdm_available():
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=_PATIENCE, leave=False) as bar:
            yield bar.update
    else:
        yield lambda done: None
    seconds = time.perf_counter() - start
    if shown:
        speed = convert_bytes(total / max(seconds, 1e-9))
        logger.info(f"{what}: {convert_bytes(total)} in {seconds:.1f} s, {speed}/s")
