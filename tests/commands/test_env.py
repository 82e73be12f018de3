"""`zeroaccel env`: what it tells, also of a machine where something is broken."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch

import zeroaccel
from tests.commands.runs import clean_environment
from zeroaccel.engine import ops


def told(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zeroaccel", "env", *words]
    environment = clean_environment(**variables)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def sections(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, value = line.strip().partition("  ")
            found[next(reversed(found))][name] = value.strip()
        else:
            found[line.rstrip(":")] = {}
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], Path]:
    """What it tells here, with a launch configuration in the default place, and that file."""
    home = tmp_path_factory.mktemp("home")
    file = home / "default_config.yaml"
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: 3\ndeepspeed_config:\n  zero_stage: 2\n")
    done = told(ZEROACCEL_HOME=str(home), HF_TOKEN="hf_secret", NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout
    return sections(done.stdout), file


def test_versions_and_machine(here: tuple[dict[str, dict[str, str]], Path]) -> None:
    versions, machine = here[0]["versions"], here[0]["machine"]
    assert versions["zeroaccel"].split()[0] == zeroaccel.__version__
    assert versions["Python"] == f"{platform.python_version()} ({sys.executable})"
    assert (versions["torch"], versions["deepspeed"]) == (torch.__version__, deepspeed.__version__)
    assert list(versions)[3:] == ["torch", "deepspeed", "numpy", "transformers", "accelerate", "safetensors"]
    assert 0 < float(machine["host memory"].removesuffix(" GiB")) < 2**14
    assert any(name.startswith("GPU") for name in machine)
    assert "found" not in here[0]["compilers"]["ninja"]


def test_ops_stand_as_they_do(here: tuple[dict[str, dict[str, str]], Path]) -> None:
    told_ops = here[0]["DeepSpeed's ops"]
    assert list(told_ops) == list(ops.BUILDERS)
    for name in ("cpu_adam", "async_io", "fused_lamb"):
        status = ops.status(name)
        assert told_ops[name].split(":")[0] == status.state
        assert all(lack.what in told_ops[name] and lack.remedy in told_ops[name] for lack in status.lacks)


def test_the_default_launch_configuration_and_the_variables(
    here: tuple[dict[str, dict[str, str]], Path],
) -> None:
    found, file = here
    config = found[f"launch configuration ({file})"]
    assert (config["num_processes"], config["zero_stage"]) == ("3", "2")
    assert found["environment"]["NCCL_DEBUG"] == "WARN"
    assert found["environment"]["ZEROACCEL_HOME"] == str(file.parent)
    assert "HF_TOKEN" not in found["environment"]


def test_a_broken_machine_is_described_all_the_same(tmp_path: Path) -> None:
    package = tmp_path / "path" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: xyz')")
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: NO\nnum_processes: 1\n")
    done = told("--config-file", str(file), PYTHONPATH=str(package.parent), CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    found = sections(done.stdout)
    assert found["DeepSpeed's ops"] == {"DeepSpeed": "cannot be asked: ImportError: undefined symbol: xyz"}
    assert found["compilers"]["C++ compiler"] == "no-such-compiler not found"
    assert found[f"launch configuration ({file})"]["num_processes"] == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no launch configuration"), ("num_processes: many\n", "num_processes is 'many'")],
)
def test_a_bad_launch_configuration_is_an_error(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    if content is not None:
        file.write_text(content)
    done = told("--config_file", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zeroaccel env: error: ")
    assert message in done.stderr
