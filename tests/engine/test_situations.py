"""Several losses, heads, engines, exceptions: right on every stage. `tests/engine/situations.py` holds the loops."""

from __future__ import annotations

import pytest

from tests.distributed.pool import RankPool
from tests.engine.situations import Kind, failures

KINDS = [Kind(0), Kind(1), Kind(2), Kind(3)]
FULL = [
    Kind(stage, offload, precision)
    for precision in ("no", "bf16", "fp16")
    for stage, offload in ((0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"))
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ordinary_loops_give_pytorchs_weights(kind: Kind, ranks: RankPool) -> None:
    check(kind, ranks)


@pytest.mark.full
@pytest.mark.parametrize("kind", FULL, ids=str)
def test_ordinary_loops_everywhere(kind: Kind, ranks: RankPool) -> None:
    check(kind, ranks)


def check(kind: Kind, ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(failures, kind=kind, timeout=120)):
        assert not found, f"rank {rank}: {found}"
