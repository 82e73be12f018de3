from __future__ import annotations

from collections.abc import Iterator

import accelerate
import pytest

from tests.distributed.pool import reset_states


def forget_everything() -> None:
    reset_states()
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def alone_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that no launcher started, for this library and for Accelerate, whatever ran before."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_everything()
    accelerate.Accelerator()  # its synchronization of generators asks for its state
    yield
    forget_everything()
