from __future__ import annotations

import pytest

from tests.distributed.pool import reset_states


@pytest.fixture(autouse=True)
def fresh_states() -> None:
    """No state of a test that ran before in this process."""
    reset_states()
