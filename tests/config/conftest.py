from __future__ import annotations

import os

import pytest

from zeroaccel.config import environment


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher around the tests reaches them."""
    for name in list(os.environ):
        if name.startswith((environment.PREFIX, environment.FALLBACK_PREFIX)):
            monkeypatch.delenv(name)
