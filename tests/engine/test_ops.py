"""DeepSpeed's just-in-time ops: what a config needs, what the machine lacks, one build for all ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.runs import clean_environment, wait_until
from tests.distributed.pool import RankPool
from tests.engine.build_tiny import SOURCE
from tests.engine.small import accelerator, loader, net
from zeroaccel.engine import ops
from zeroaccel.errors import EnvironmentProblem

NVME = {"device": "nvme", "nvme_path": "/nvme"}
CPU = {"device": "cpu"}


def config(optimizer: str | None = None, stage: int = 2, **rest: Any) -> dict[str, Any]:
    sections = {"optimizer": {"type": optimizer, "params": {"lr": 0.1}}} if optimizer else {}
    zero = {"stage": stage, **{key: rest.pop(key) for key in list(rest) if "offload" in key or key.startswith("zero")}}
    return {"zero_optimization": zero, **sections, **rest}


NEEDED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": (config(), []),
    "Adam": (config("Adam"), ["fused_adam"]),
    "AdamW of a mixed case": (config("AdamW", stage=0, offload_optimizer=CPU), ["fused_adam"]),
    "AdamW offloaded": (config("AdamW", offload_optimizer=CPU), ["cpu_adam"]),
    "PyTorch's Adam": (config() | {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, []),
    "Adagrad": (config("Adagrad"), []),
    "Adagrad offloaded": (config("Adagrad", offload_optimizer=CPU), ["cpu_adagrad"]),
    "Lion": (config("Lion"), ["fused_lion"]),
    "Lion offloaded": (config("Lion", offload_optimizer=CPU), ["cpu_lion"]),
    "SGD": (config("SGD", offload_optimizer=CPU), []),
    "parameters on NVMe": (config(stage=3, offload_param=NVME), ["pin_memory", "async_io"]),
    "optimizer on NVMe": (config("AdamW", 3, offload_optimizer=NVME), ["cpu_adam", "pin_memory", "async_io"]),
    "NVMe at stage 2 is the CPU": (config("AdamW", 2, offload_optimizer=NVME), ["cpu_adam"]),
    "GPU direct storage": (config(stage=3, offload_param=NVME, aio={"use_gds": True}), ["pin_memory", "gds"]),
    "quantized weights": (config(stage=3, zero_quantized_weights=True), ["quantizer"]),
    "sections left open": ({"zero_optimization": {"offload_optimizer": None}, "aio": None, "optimizer": None}, []),
}


@pytest.mark.parametrize("name", list(NEEDED))
def test_a_config_names_its_ops(name: str) -> None:
    asked, expected = NEEDED[name]
    assert ops.needed(asked) == expected


@pytest.fixture(scope="module")
def rank() -> Iterator[RankPool]:
    """A process of its own: `prepare()` would leave its process group in this one."""
    pool = RankPool(1)
    yield pool
    pool.close()


def loaded_ops(asked: dict[str, Any]) -> list[str]:
    """What DeepSpeed loads for a config."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    from zeroaccel.utils import DummyOptim

    OpBuilder._loaded_ops.clear()
    sys.__dict__.pop("_deepspeed_pin_memory_op_module", None)
    model = net()
    accelerator(asked).prepare(model, DummyOptim(model.parameters()), loader())
    return sorted(OpBuilder._loaded_ops)


@pytest.mark.parametrize("name", ["Adam", "Adagrad offloaded", "optimizer on NVMe"])
def test_deepspeed_loads_just_these(name: str, rank: RankPool, tmp_path: Path) -> None:
    """A fact about DeepSpeed: `needed` foretells what it compiles."""
    asked, expected = NEEDED[name]
    if "NVMe" in name:
        asked["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    assert rank.run(loaded_ops, asked=asked) == [sorted(expected)]


# --- what the machine lacks -------------------------------------------------------------------------------------


def programs(folder: Path, *without: str) -> str:
    """A PATH with the programs of this one, some left out."""
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            if not any(part in program.name for part in without):
                link = folder / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return str(folder)


def without_ninja(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python"))  # else the ninja beside it is found
    monkeypatch.setenv("PATH", programs(folder, "ninja"))


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", programs(folder, "c++", "g++", "gcc", "clang"))


def without_libaio(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CFLAGS", "-include /no/such/header.h")


LACKING: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str, str]] = {
    "ninja": (without_ninja, "cpu_lion", "lacks ninja (pip install ninja)"),
    "compiler": (without_compiler, "cpu_lion", "lacks the C++ compiler c++ (apt-get install g++)"),
    "compiler, for libaio": (without_compiler, "async_io", "(apt-get install g++)"),
    "libaio": (without_libaio, "async_io", "lacks libaio with its headers (apt-get install libaio-dev)"),
    "GPU": (
        lambda *_: None,
        "fused_lamb",
        "lacks a GPU, which fused_lamb runs on (choose another optimizer or device)",
    ),
}


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the commands are Debian's")
@pytest.mark.parametrize("what", list(LACKING))
def test_what_is_missing_is_one_error_with_its_package(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_away, name, told = LACKING[what]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {"pin_memory": None})
    take_away(monkeypatch, tmp_path)
    found = ops.status(name)
    assert found.state == "missing"
    assert found.remedy in told
    with pytest.raises(EnvironmentProblem) as caught:
        ops.build([name])
    assert f"needs DeepSpeed's {name}" in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ops"))
    with pytest.raises(
        EnvironmentProblem, match=rf"for {tmp_path}/file.* cannot be written \(Not a directory\): set TORCH"
    ):
        ops.build(["cpu_lion"])


def test_ninja_beside_python_is_found_without_the_shells_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path, "ninja"))
    assert ops.status("cpu_adam").state == "ready"


def test_ops_of_the_set_up_are_ready_and_others_buildable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [ops.status(name).state for name in ("cpu_adam", "fused_adam", "async_io")] == ["ready"] * 3
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ops.status("cpu_adam") == ops.Status("cpu_adam", "buildable")


def test_a_failing_compiler_is_quoted() -> None:
    log = "Error building extension 'x': [1/3] c++ ...\nx.cpp:3:10: fatal error: aio.h: No such file\nninja: stopped"
    assert ops._reason(log) == "x.cpp:3:10: fatal error: aio.h: No such file"
    assert "MAX_JOBS=1" in ops._reason("c++: fatal error: Killed signal terminated program cc1plus")
    assert ops._reason("one line\n") == "one line"


# --- one build for all ------------------------------------------------------------------------------------------


def builder(folder: Path) -> subprocess.Popen[str]:
    """A process that builds a small op with a slow compiler."""
    source, compiler = folder / "tiny.cpp", folder / "slow-g++"
    source.write_text(SOURCE) if not source.exists() else None
    compiler.write_text('#!/bin/sh\nsleep 0.7\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = clean_environment(TORCH_EXTENSIONS_DIR=str(folder), DS_ACCELERATOR="cpu", CXX=str(compiler))
    command = (sys.executable, "-m", "tests.engine.build_tiny", str(source))
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_is_taken_over_by_one_process_while_the_other_waits(tmp_path: Path) -> None:
    lock = tmp_path / "tiny" / "lock"
    killed = builder(tmp_path)
    wait_until(lambda: lock.exists() and (tmp_path / "tiny" / "build.ninja").exists(), "the build begins")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert lock.exists(), "nothing was left behind: this test tests nothing"
    ranks = [builder(tmp_path) for _ in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert not lock.exists()
    text = "".join(said)
    assert text.count(f"removed {lock}, which a killed build had left") == 1
    assert text.count("compiling DeepSpeed's tiny") == text.count("compiled tiny in") == 1


def test_a_lock_whose_builder_lives_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "lock"
    holds = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT); time.sleep(1.5); os.remove(sys.argv[1])"
    other = subprocess.Popen((sys.executable, "-c", holds, str(lock)))
    wait_until(lock.exists, "the other process holds the lock")
    ops._free(tmp_path)
    assert not lock.exists()
    assert other.wait(timeout=10) == 0, "its lock was taken away"
    assert f"process {other.pid} builds {tmp_path.name}: waiting for it" in capsys.readouterr().err


def test_a_lock_on_a_shared_disk_is_kept_while_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builders on other machines cannot be seen: a folder in which nothing happens any more is given up."""
    monkeypatch.setattr(ops, "_LOCAL_FILE_SYSTEMS", set())
    monkeypatch.setattr(ops, "_SILENCE", 1.0)
    lock = tmp_path / "lock"
    lock.touch()
    assert ops._untouched(tmp_path) < 1.0
    ops._free(tmp_path)
    assert ops._untouched(tmp_path) < 1.0, "removing the lock has just changed the folder"
    assert not lock.exists()
