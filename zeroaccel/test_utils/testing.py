"""Test cases, commands and comparisons for test suites of training scripts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import zeroaccel
from zeroaccel.config.env_patch import parse_choice_from_env
from zeroaccel.config.env_patch import parse_flag_from_env as parse_flag_from_env
from zeroaccel.distributed.operations import gather
from zeroaccel.state import AcceleratorState, GradientState
from zeroaccel.test_utils.conditions import *  # noqa: F403
from zeroaccel.test_utils.conditions import device_count as device_count
from zeroaccel.test_utils.conditions import get_backend as get_backend
from zeroaccel.test_utils.conditions import memory_allocated_func as memory_allocated_func
from zeroaccel.test_utils.conditions import torch_device as torch_device


def get_launch_command(**kwargs: Any) -> list[str]:
    """A `zeroaccel launch` command, without the script.

    Args:
        kwargs: options: `--name` for what is True, `--name=value` for the rest; None leaves the option out.
    """
    command = ["zeroaccel", "launch"]
    for name, value in kwargs.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not None:
            command.append(f"--{name}={value}")
    return command


DEFAULT_LAUNCH_COMMAND = get_launch_command(num_processes=device_count)


class TempDirTestCase(unittest.TestCase):
    """Tests that share one folder, `self.tmpdir`, emptied before each unless `clear_on_setup` is False."""

    clear_on_setup: ClassVar[bool] = True
    tmpdir: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        cls.tmpdir = Path(tempfile.mkdtemp())

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.tmpdir, ignore_errors=True)

    def setUp(self) -> None:
        if self.clear_on_setup:
            for path in self.tmpdir.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


class AccelerateTestCase(unittest.TestCase):
    """Tests that each begin without an Accelerator: the state that one leaves is forgotten."""

    def tearDown(self) -> None:
        super().tearDown()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


class MockingTestCase(unittest.TestCase):
    """Tests with patches that hold during each of them: call `self.add_mocks(...)` at the end of `setUp`."""

    def add_mocks(self, mocks: Any) -> None:
        """Starts patches (of `unittest.mock.patch`), one or a list, and stops them after the test."""
        self.mocks = mocks if isinstance(mocks, (tuple, list)) else [mocks]
        for mock in self.mocks:
            mock.start()
            self.addCleanup(mock.stop)


def are_the_same_tensors(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same tensor. Collective; shapes must agree."""
    own = tensor[None].clone().to(AcceleratorState().device)
    return all(torch.equal(other, own[0]) for other in gather(own))


@contextmanager
def assert_exception(exception_class: type[BaseException], msg: str | None = None) -> Iterator[None]:
    """The block must raise such an exception, with `msg` in its text.

    Raises:
        AssertionError: it did not.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, exception_class):
            raise AssertionError(f"{exception_class} was expected, {type(error)} was raised: {error}") from error
        if msg is not None and msg not in str(error):
            raise AssertionError(f"{msg!r} was expected in the text of the error: {error}") from error
    else:
        raise AssertionError(f"{exception_class} was expected, nothing was raised")


def capture_call_output(func: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What the function prints when it is called with these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        func(*args, **kwargs)
    return printed.getvalue()


class SubprocessCallException(Exception):
    """A command failed; the text holds its output."""


def run_command(
    command: Sequence[str | Path], return_stdout: bool = False, env: Mapping[str, str] | None = None
) -> str | None:
    """Runs a command.

    Args:
        command: the program and its arguments.
        return_stdout: return what it printed, errors included.
        env: its environment; default: this process's.

    Raises:
        SubprocessCallException: its exit status was not 0.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True, check=False)
    if done.returncode != 0:
        raise SubprocessCallException(f"`{' '.join(words)}` ended with status {done.returncode}:\n\n{done.stdout}")
    return done.stdout if return_stdout else None


@dataclass
class RunOutput:
    """What a command left: exit status, and lines without line ends."""

    returncode: int
    stdout: list[str]
    stderr: list[str]


def execute_subprocess_async(
    cmd: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    stdin: Any = None,
    timeout: float | None = 180,
    quiet: bool = False,
    echo: bool = True,
) -> RunOutput:
    """Runs a command and shows its output while it runs.

    Args:
        cmd: the program and its arguments.
        env: its environment; default: this process's.
        stdin: its standard input.
        timeout: seconds after which it is killed.
        quiet: do not show its output.
        echo: show the command.

    Raises:
        RuntimeError: its exit status was not 0, or it was killed; the text holds what it wrote to stderr.
    """
    words = [str(word) for word in cmd]
    if echo:
        print("\nRunning:", *words)
    result = asyncio.run(_stream(words, env, stdin, timeout, quiet))
    if result.returncode != 0:
        errors = "\n".join(result.stderr)
        raise RuntimeError(f"`{' '.join(words)}` ended with status {result.returncode}, and on stderr:\n{errors}")
    return result


async def _stream(
    words: list[str], env: Mapping[str, str] | None, stdin: Any, timeout: float | None, quiet: bool
) -> RunOutput:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=stdin, stdout=pipe, stderr=pipe, env=env)
    result = RunOutput(0, [], [])

    async def read(stream: Any, lines: list[str], shown_on: Any) -> None:
        async for line in stream:
            lines.append(line.decode(errors="replace").rstrip())
            if not quiet:
                print(lines[-1], file=shown_on)

    readers = asyncio.gather(
        read(process.stdout, result.stdout, sys.stdout), read(process.stderr, result.stderr, sys.stderr)
    )
    try:
        await asyncio.wait_for(readers, timeout)
    except asyncio.TimeoutError:
        process.kill()
        result.stderr.append(f"killed after {timeout} s")
    result.returncode = await process.wait()
    return result


def path_in_accelerate_package(*components: str) -> Path:
    """Path of a file in this package, e.g. `path_in_accelerate_package("test_utils", "training.py")`."""
    return Path(zeroaccel.__file__).parent.joinpath(*components)


path_in_zeroaccel_package = path_in_accelerate_package  # what replacing the import name makes of the name


def pytest_xdist_worker_id() -> int:
    """Number of the pytest-xdist worker that this process is; 0 without pytest-xdist."""
    return int(parse_choice_from_env("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def get_torch_dist_unique_port() -> int:
    """A port for the ranks that no other pytest-xdist worker takes: 29500 and up."""
    return 29500 + pytest_xdist_worker_id()
