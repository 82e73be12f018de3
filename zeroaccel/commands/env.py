"""`zeroaccel env`: versions, devices, memory, DeepSpeed's ops and the launch configuration, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import zeroaccel
from zeroaccel.commands.arguments import OneLineParser, add_option
from zeroaccel.config import launch_file

_PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "accelerate", "safetensors")
_GIB = 2**30
# Variables that change what runs, by how they begin. Others can hold secrets.
_VARIABLES = (
    "ZEROACCEL_",
    "ACCELERATE_",
    "CUDA_",
    "DS_",
    "GLOO_",
    "HIP_",
    "LD_LIBRARY_PATH",
    "MASTER_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "ROCR_",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "TORCH_",
)


def env_command_parser() -> OneLineParser:
    """The parser of `zeroaccel env`."""
    parser = OneLineParser(prog="zeroaccel env", description="What a bug report should say about this machine.")
    add_option(
        parser,
        parser,
        "--config_file",
        metavar="FILE",
        help="launch configuration to show (default: what `zeroaccel launch` would read)",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel env`; returns its exit status."""
    env_command(env_command_parser().parse_args(argv))
    return 0


def env_command(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Prints what there is, and returns it: sections of names and values.

    Raises:
        ConfigError: the file that the options name cannot be read, or is no launch configuration.
    """
    config = _launch_configuration(args.config_file)  # what a user can get wrong comes before what is slow
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "compilers": _compilers(),
        "DeepSpeed's ops": _ops(),
        **config,
        "environment": variables,
    }
    for title, rows in sections.items():
        print(f"{title}:" if rows else f"{title}: none")
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            print(f"  {name.ljust(width)}  {value}")
    return sections


def _versions() -> dict[str, str]:
    found = {
        "zeroaccel": f"{zeroaccel.__version__} ({shutil.which('zeroaccel') or 'not on the PATH'})",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, str]:
    from zeroaccel.commands.launch_memory import Memory
    from zeroaccel.engine.machine import gpus

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": f"{platform.machine()}, {cores} cores for this process"}
    found["host memory"] = f"{Memory.read().limit / _GIB:.1f} GiB"
    for index, gpu in enumerate(here := gpus()):
        capability = f", compute capability {gpu.capability}" if gpu.capability else ""
        found[f"GPU {index}"] = f"{gpu.name}, {gpu.memory / _GIB:.1f} GiB{capability}"
    if not here:
        found["GPU"] = "none: the ranks run on the CPU"
    return found


def _compilers() -> dict[str, str]:
    import torch
    from torch.utils import cpp_extension

    compiler = str(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    found = {"C++ compiler": _version_of(compiler), "ninja": _version_of("ninja")}
    if torch.version.cuda is not None:
        home = cpp_extension.CUDA_HOME
        found["CUDA of PyTorch"] = torch.version.cuda
        found["CUDA toolkit"] = f"{home}" if home else "not found: install it, and set CUDA_HOME to its folder"
        found["CUDA architectures"] = " ".join(torch.cuda.get_arch_list()) or "unknown without a GPU"
    return found


def _version_of(command: str) -> str:
    """First line that a program says about its version."""
    words = shlex.split(command)
    beside = os.path.dirname(sys.executable)  # where pip puts ninja, whatever the shell's PATH
    program = shutil.which(words[0]) or shutil.which(words[0], path=beside)
    if program is None:
        return f"{words[0]} not found"
    told = subprocess.run([program, *words[1:], "--version"], capture_output=True, text=True, timeout=30)
    return f"{(told.stdout or told.stderr).strip().splitlines()[0]} ({program})"


def _ops() -> dict[str, str]:
    try:
        from zeroaccel.engine import ops

        statuses = [ops.status(name) for name in ops.BUILDERS]
    except Exception as error:  # a broken DeepSpeed is what the report is then about
        return {"DeepSpeed": f"cannot be asked: {type(error).__name__}: {error}"}
    found = {}
    for status in statuses:
        found[status.name] = status.state
        if status.state == "buildable":
            found[status.name] += ": compiled where a training needs it, once on this machine"
        if status.lacks:
            found[status.name] += ": " + "; ".join(f"{lack.what} ({lack.remedy})" for lack in status.lacks)
    return found


def _launch_configuration(path: str | None) -> dict[str, dict[str, str]]:
    """The section of the launch configuration: its title names the file."""
    chosen = os.path.expanduser(path) if path is not None else launch_file.default_path()
    if path is None and not os.path.exists(chosen):
        return {f"launch configuration (there is no {chosen})": {}}
    return {f"launch configuration ({chosen})": {name: str(value) for name, value in launch_file.read(chosen).items()}}


def main() -> int:
    """`zeroaccel env` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["env", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
