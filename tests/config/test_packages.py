"""Which packages are there: the answers of Accelerate, without importing anything."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import accelerate.utils.imports as theirs
import pytest
from packaging.version import parse

from zeroaccel import refused
from zeroaccel.config import packages
from zeroaccel.errors import ConfigError
from zeroaccel.utils import imports as ours

NAMES = sorted({name for name in ours.__all__ if name.startswith("is_")} - set(refused.UNAVAILABLE))


@pytest.mark.parametrize("name", NAMES)
def test_availability_is_what_accelerate_finds(name: str) -> None:
    assert getattr(ours, name)() is bool(getattr(theirs, name)())
    assert inspect.getdoc(getattr(ours, name))


@pytest.mark.parametrize(
    ("left", "operation", "right", "expected"),
    [
        ("1.10", ">", "1.9", True),
        ("1.9", ">=", "1.9.0", True),
        ("2.0", "==", "2.0.1", False),
        ("2.0", "!=", "2.0.1", True),
        ("2.0rc1", "<", "2.0", True),
        ("2.0", "<=", "1.9.9", False),
    ],
)
def test_versions_compare_as_numbers(left: str, operation: str, right: str, expected: bool) -> None:
    assert packages.compare_versions(parse(left), operation, right) is expected


def test_versions_of_installed_distributions() -> None:
    torch_version = importlib.metadata.version("torch")
    assert packages.is_torch_version("==", torch_version)
    assert not packages.compare_versions("torch", ">", torch_version)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        packages.compare_versions("no-such-distribution", ">", "1")
    with pytest.raises(ConfigError, match="operation '=>' is unknown: write one of >, >="):
        packages.compare_versions("torch", "=>", "1")


def test_least_versions_are_asked_for() -> None:
    assert packages.is_numpy_available()
    assert not packages.is_numpy_available("1000")
    assert packages._installed("numpy", requirement=(">=", "1.0"))()
    assert not packages._installed("numpy", requirement=("<", "1.0"))()


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb_like").mkdir()
    (tmp_path / "wandb_like" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packages.installed_version("wandb_like") is None
    assert packages.installed_version("wandb_like", "no-such-distribution", "numpy") is not None


def test_rich_is_available_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packages.is_rich_available()
    monkeypatch.setenv("ZEROACCEL_ENABLE_RICH", "1")
    assert packages.is_rich_available() is (packages.installed_version("rich") is not None)


def test_asking_imports_nothing() -> None:
    program = (
        "import sys; from zeroaccel.config import packages as p;"
        "asked = [p.is_transformers_available(), p.is_deepspeed_available(), p.is_fp8_available()];"
        "print(p.are_libraries_initialized('transformers', 'deepspeed', 'torch', 'sys'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['sys']\n"
