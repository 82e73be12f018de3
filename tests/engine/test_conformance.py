"""Every backend speaks the same vocabulary: `tests/engine/conformance.py` holds what it must mean."""

from __future__ import annotations

import pytest

from tests.distributed.pool import RankPool, reset_states
from tests.engine.conformance import CHECKS, failures


def test_there_are_checks() -> None:
    assert len(CHECKS) > 20


def test_plain_pytorch() -> None:
    try:
        assert not (found := failures()), "\n".join(found)
    finally:
        reset_states()


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
)
def test_deepspeed(stage: int, offload: str, ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(failures, stage=stage, offload=offload, timeout=240)):
        assert not found, f"rank {rank}:\n" + "\n".join(found)
