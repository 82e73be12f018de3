"""DeepSpeed's just-in-time ops: which ones a config needs, whether they are there, and building them once a machine.

DeepSpeed compiles an op inside the first call that uses it, in silence. A build that was killed leaves a `lock` file
behind, and every later process waits for it for ever. So ops are built before the engine is: by the process that
gets the build folder's lock first, while the others wait. That lock is the kernel's and dies with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from zeroaccel.config import environment
from zeroaccel.errors import EnvironmentProblem

# op -> DeepSpeed's builder of it.
BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
    "fused_lamb": "FusedLambBuilder",
    "fused_lion": "FusedLionBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
    "gds": "GDSBuilder",
    "quantizer": "QuantizerBuilder",
}

# Optimizer of the config -> its op with the state on the device, and with the state offloaded.
_OPTIMIZERS = {
    "adam": ("fused_adam", "cpu_adam"),
    "adamw": ("fused_adam", "cpu_adam"),
    "muon": ("fused_adam", "cpu_adam"),
    "adagrad": (None, "cpu_adagrad"),
    "lamb": ("fused_lamb", "fused_lamb"),
    "lion": ("fused_lion", "cpu_lion"),
}

# Where only this machine's processes can be building, so that all builders can be seen.
_LOCAL_FILE_SYSTEMS = {"ext2/ext3", "xfs", "btrfs", "tmpfs", "overlayfs", "zfs", "f2fs"}
# Elsewhere a builder on another machine is taken for dead after so many seconds without a change in the folder.
_SILENCE = 600.0
# Seconds of waiting for another process that need no explanation.
_PATIENCE = 5.0


class Lack(NamedTuple):
    """Something that the machine has not, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Status:
    """How an op stands on this machine.

    Attributes:
        name: of the op, as DeepSpeed calls it.
        state: "ready", "buildable" (compiled before its first use) or "missing" (cannot be compiled here).
        lacks: what is missing, each with what mends it.
    """

    name: str
    state: str
    lacks: tuple[Lack, ...] = ()

    @property
    def remedy(self) -> str:
        """What mends it, e.g. `apt-get install libaio-dev`; empty unless it is missing."""
        return "; ".join(lack.remedy for lack in self.lacks)


def needed(config: Mapping[str, Any]) -> list[str]:
    """Ops that a DeepSpeed config uses, whatever the script brings; an offloaded optimizer of the script needs more."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    devices = {part: (zero.get(part) or {}).get("device") for part in ("offload_optimizer", "offload_param")}
    names = [_of_optimizer(config, offloaded=stage != 0 and devices["offload_optimizer"] in ("cpu", "nvme"))]
    if stage == 3 and "nvme" in devices.values():
        names += ["pin_memory", "gds" if (config.get("aio") or {}).get("use_gds") else "async_io"]
    if any(zero.get(key) for key in ("zero_quantized_weights", "zero_quantized_gradients")):
        names.append("quantizer")
    if zero.get("zenflow"):
        names.append("cpu_adam")
    return list(dict.fromkeys(name for name in names if name is not None))


def _of_optimizer(config: Mapping[str, Any], offloaded: bool) -> str | None:
    optimizer = config.get("optimizer") or {}
    if (optimizer.get("params") or {}).get("torch_adam"):
        return None
    return _OPTIMIZERS.get(str(optimizer.get("type")).lower(), (None, None))[offloaded]


# --- how an op stands -------------------------------------------------------------------------------------------


def status(name: str) -> Status:
    """Whether an op of `BUILDERS` is ready, buildable or missing here; builds nothing."""
    builder = _builder(name)
    if builder is None:
        return Status(name, "missing", (Lack(f"a GPU, which {name} runs on", "choose another optimizer or device"),))
    if _installed(name):
        return Status(name, "ready")
    if not _find_ninja():  # PyTorch asks for it even where there is nothing to build
        return Status(name, "missing", (Lack("ninja", "pip install ninja"), *_lacks(builder)))
    # async_io tries the compiler and libaio each time that it is loaded.
    if _up_to_date(builder) and (name not in ("async_io", "gds") or not _lacks(builder)):
        return Status(name, "ready")
    lacks = tuple(_lacks(builder))
    return Status(name, "missing" if lacks else "buildable", lacks)


def _find_ninja() -> bool:
    """Whether PyTorch can call ninja; one that pip put beside this Python counts, whatever the shell's PATH."""
    beside = Path(sys.executable).with_name("ninja")
    if shutil.which("ninja") is None and beside.exists():
        environment.add_to_path(str(beside.parent))
    return shutil.which("ninja") is not None


def _builder(name: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(BUILDERS[name])
    return builder if builder is not None and builder.name == name else None


def _installed(name: str) -> bool:
    """Whether DeepSpeed itself was installed with the op compiled."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    return bool(installed_ops.get(name)) and accelerator_name == get_accelerator()._name


def _folder(name: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False)).resolve()


def _up_to_date(builder: Any) -> bool:
    """Whether the op was built from this PyTorch and this DeepSpeed, and neither has changed since."""
    import deepspeed
    import torch

    folder = _folder(builder.name)
    recipe = folder / "build.ninja"
    if not recipe.exists() or not (folder / f"{builder.name}.so").exists():
        return False
    text = recipe.read_text()
    if not all(f"{package.__path__[0]}/" in text for package in (torch, deepspeed)):
        return False
    plan = subprocess.run(["ninja", "-n", "-C", str(folder)], capture_output=True, text=True)
    return "no work to do" in plan.stdout


def _lacks(builder: Any) -> list[Lack]:
    """What the machine lacks to compile an op, ninja apart."""
    from torch.utils.cpp_extension import get_cxx_compiler

    lacks = []
    compilers = [str(get_cxx_compiler())]  # type: ignore[no-untyped-call]
    if builder.name in ("async_io", "gds"):  # libaio is looked for with the compiler that Python was built with
        compilers.append(str(sysconfig.get_config_var("CC")))
    if any(shutil.which(shlex.split(compiler)[0]) is None for compiler in compilers):
        lacks.append(Lack(f"the C++ compiler {compilers[-1]}", _install("g++", "gcc-c++")))
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        lacks.append(Lack("Python's headers", _install("python3-dev", "python3-devel")))
    lacks += _lacks_of_cuda(builder)
    if lacks:
        return lacks
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its reasons; stdout is the script's
        fits = builder.is_compatible(verbose=True)
    if fits:
        return []
    if builder.name == "async_io":
        return [Lack("libaio with its headers", _install("libaio-dev", "libaio-devel"))]
    return [Lack(f"what {builder.name} needs", str(builder.error_log))]


def _lacks_of_cuda(builder: Any) -> list[Lack]:
    import torch
    from deepspeed.ops.op_builder import builder as base

    if not isinstance(builder, base.CUDAOpBuilder) or not torch.cuda.is_available() or builder.is_rocm_pytorch():
        return []
    wanted = torch.version.cuda
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            base.assert_no_cuda_mismatch(builder.name)
    except base.MissingCUDAException:
        remedy = f"install the CUDA {wanted} toolkit, and set CUDA_HOME to its folder"
        return [Lack("the CUDA compiler nvcc", remedy)]
    except base.CUDAMismatchException:
        found = ".".join(map(str, base.installed_cuda_version()))
        remedy = f"install that toolkit (CUDA_HOME has {found}), or try this one with DS_SKIP_CUDA_CHECK=1"
        return [Lack(f"CUDA {wanted}, which PyTorch was built with", remedy)]
    return []


def _install(debian: str, red_hat: str) -> str:
    """The command that installs a package here."""
    manager = next((name for name in ("dnf", "yum") if shutil.which(name)), None)
    return f"{manager} install {red_hat}" if manager and not shutil.which("apt-get") else f"apt-get install {debian}"


# --- building ---------------------------------------------------------------------------------------------------


def build(names: Sequence[str]) -> None:
    """Has ops ready when it returns: one process of this machine compiles what is not, the others wait for it.

    Also frees ops from the lock of a build that was killed.

    Raises:
        EnvironmentProblem: the machine lacks what they are compiled with, the compiler fails, or nothing can be
            written where they belong.
    """
    if "async_io" in names or "gds" in names:
        names = ["pin_memory", *names]  # DeepSpeed loads it first
    names = [name for name in dict.fromkeys(names) if not _loaded(name)]
    if not names:
        return
    with _alone(names[0]):
        for name in names:
            _free(_folder(name))
        found = [status(name) for name in names]
        _refuse_missing([each for each in found if each.state == "missing"])
        for each in found:
            if each.state == "buildable":
                _compile(each.name)


def _loaded(name: str) -> bool:
    from deepspeed.ops.op_builder.builder import OpBuilder

    return name in OpBuilder._loaded_ops


def _refuse_missing(missing: list[Status]) -> None:
    if missing:
        names = ", ".join(each.name for each in missing)
        lacks = dict.fromkeys(lack for each in missing for lack in each.lacks)
        told = "; ".join(f"{lack.what} ({lack.remedy})" for lack in lacks)
        raise EnvironmentProblem(f"training needs DeepSpeed's {names}, and this machine lacks {told} to compile it")


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process at a time, over all machines that share the ops' folder; the kernel frees the lock of a dead one."""
    try:
        file = open(_folder(name).parent / "zeroaccel.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise EnvironmentProblem(
            f"DeepSpeed's ops cannot be compiled, for {error.filename} cannot be written ({error.strerror}): set"
            " TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from None
    start, told = time.monotonic(), False
    with file:
        while not _locked(file):
            if not told and time.monotonic() - start > _PATIENCE and _is_first_of_its_node():
                _say("another process compiles DeepSpeed's ops: waiting for it")
                told = True
            time.sleep(0.1)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_first_of_its_node() -> bool:
    ranks = environment.launched_ranks()
    return ranks is None or ranks.local_rank == 0


def _free(folder: Path) -> None:
    """Removes the lock that a killed build left, and waits for a living one."""
    lock = folder / "lock"
    told = False
    while lock.exists():
        builders = _processes_in(folder)
        if not builders and (_is_local(folder) or _untouched(folder) > _SILENCE):
            lock.unlink(missing_ok=True)
            _say(f"removed {lock}, which a killed build had left")
        elif not told:
            who = f"process {builders[0]}" if builders else "another machine, it seems,"
            _say(f"{who} builds {folder.name}: waiting for it")
            told = True
        time.sleep(0.1)


def _processes_in(folder: Path) -> list[int]:
    """Processes that hold the folder's lock (PyTorch keeps the file open), or compile there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            links = [process / "cwd", *(process / "fd").iterdir()]
            if any(os.readlink(link) in (str(folder), str(folder / "lock")) for link in links):
                found.append(int(process.name))
    return found


def _is_local(folder: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True)
    return kind.stdout.strip() in _LOCAL_FILE_SYSTEMS


def _untouched(folder: Path) -> float:
    """Seconds since anything in the folder changed."""
    return time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])


def _compile(name: str) -> None:
    _say(f"compiling DeepSpeed's {name}, once on this machine; this takes a minute or so")
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _builder(name).load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise EnvironmentProblem(f"DeepSpeed's {name} does not compile here: {_reason(str(error))}") from error
    _say(f"compiled {name} in {time.monotonic() - start:.0f} s")


def _reason(output: str) -> str:
    """The line of a compiler's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("Killed" in line for line in lines):
        return "the compiler was killed, probably for lack of memory: try again with MAX_JOBS=1 in the environment"
    return next((line for line in lines if "error:" in line), lines[-1])


def _say(line: str) -> None:
    print(f"zeroaccel: {line}", file=sys.stderr, flush=True)
