from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Two ranks: `ranks.run(function, **kwargs)` gives their results in order."""
    pool = RankPool(2, request.config.getoption("--device"))
    yield pool
    pool.close()


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """Later modules fork this process, which a process group forbids: what needs one runs in a `RankPool`."""
    yield
    distributed = sys.modules.get("torch.distributed")
    assert distributed is None or not distributed.is_initialized(), "a test of this module left a process group"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the exhaustive matrices too")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of the pool's ranks: gloo, or two GPUs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    chosen = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = chosen
