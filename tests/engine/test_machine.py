"""What the machine has: on the CPUs that the tests run on, and for devices that a package brings."""

from __future__ import annotations

import logging
import platform
import sys
from pathlib import Path

import accelerate.utils.environment as theirs
import pytest
import torch

from zeroaccel.engine import machine


def test_the_kind_of_device_is_accelerates() -> None:
    assert machine.get_current_device_type() == theirs.get_current_device_type()


def _install(folder: Path, package: str, code: str) -> None:
    (folder / f"{package}.py").write_text(code)


def test_a_device_is_there_where_its_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    _install(
        tmp_path, "torch_first", "import torch, types\ntorch.first = types.SimpleNamespace(is_available=lambda: True)"
    )
    _install(
        tmp_path, "torch_none", "import torch, types\ntorch.none = types.SimpleNamespace(is_available=lambda: False)"
    )
    _install(tmp_path, "torch_broken", "raise OSError('no driver')")
    found = {name: machine._brought_by(f"torch_{name}", name)() for name in ("first", "none", "broken", "missing")}
    assert found == {"first": True, "none": False, "broken": False, "missing": False}
    for name in ("first", "none"):
        delattr(torch, name)
        del sys.modules[f"torch_{name}"]


def test_xla_needs_its_package_and_no_veto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not machine.is_torch_xla_available()
    package = tmp_path / "torch_xla"
    package.mkdir()
    _install(package, "__init__", "")
    _install(package, "runtime", "def device_type():\n    return 'TPU'")
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = [
        machine.is_torch_xla_available(),
        machine.is_torch_xla_available(check_is_tpu=True),
        machine.is_torch_xla_available(check_is_gpu=True),
    ]
    assert answers == [True, True, False]
    monkeypatch.setenv("USE_TORCH_XLA", "0")
    assert not machine.is_torch_xla_available()
    sys.modules.pop("torch_xla.runtime")
    sys.modules.pop("torch_xla")


@pytest.mark.parametrize(
    ("system", "release", "warns"),
    [
        ("Linux", "5.4.0-150-generic", True),
        ("Linux", "4.19", True),
        ("Linux", "5.5.0", False),
        ("Linux", "6.8.0-1015-aws", False),
        ("Darwin", "1.0.0", False),
    ],
)
def test_an_old_linux_kernel_is_warned_of(
    system: str, release: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = platform.uname()._replace(system=system, release=release)
    monkeypatch.setattr(platform, "uname", lambda: answer)
    with caplog.at_level(logging.WARNING):
        machine.check_os_kernel()
    assert (f"the kernel is {release.partition('-')[0]}" in caplog.text) is warns
