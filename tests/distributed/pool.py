"""Two (or more) real ranks, with gloo on CPUs or NCCL on GPUs, that stay alive and run one function after the other.

Starting a rank costs seconds of imports, a case only milliseconds: so a test hands `pool.run(function, **kwargs)`
a module-level function, every rank calls it in step, and the test gets the ranks' results in order of rank.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankFailed(AssertionError):
    """A rank raised, died or hung; the text holds its traceback.

    Attributes:
        results: of the ranks that answered.
        hung: whether a rank did not answer in time.
    """

    def __init__(self, text: str, results: list[Any], hung: bool) -> None:
        super().__init__(text)
        self.results = results
        self.hung = hung


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def device() -> str:
    """Where this rank of a `RankPool` computes; the tests' own process computes on the CPU."""
    on_gpu = os.environ.get("DS_ACCELERATOR") == "cuda" and "LOCAL_RANK" in os.environ
    return f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"


def reset_states() -> None:
    """Forgets all state of the library, as a new process would have it; the process group stays."""
    from zeroaccel.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def _import_all() -> None:
    """What takes seconds, once."""
    import cpuinfo
    import deepspeed  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    # DeepSpeed's CPU Adam asks for a second what processor this is, each time that one is made.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def _serve(connection: Connection, environment: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    _import_all()
    while True:
        try:
            module, name, kwargs = connection.recv()
        except EOFError:
            return
        try:
            reset_states()
            result = getattr(importlib.import_module(module), name)(**kwargs)
            reply = (True, result)
        except BaseException:
            reply = (False, traceback.format_exc())
        try:
            connection.send(reply)
        except Exception:
            connection.send((False, f"result of {name} cannot be sent:\n{traceback.format_exc()}"))


class RankPool:
    """Ranks that wait for work. A failed case ends them; the next case starts new ones.

    Args:
        world_size: number of ranks.
        device: "cpu" (gloo), or "cuda": NCCL, each rank has the GPU of its number.
    """

    def __init__(self, world_size: int = 2, device: str = "cpu") -> None:
        self.world_size = world_size
        self.device = device
        self._ranks: list[tuple[Any, Connection]] = []
        self._log = ""

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = str(free_port())
        self._log = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "output.txt")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "DS_ACCELERATOR": self.device,
                "OMP_NUM_THREADS": "1",
            }
            if self.device == "cpu":
                environment["ZEROACCEL_USE_CPU"] = "true"
            process = context.Process(target=_serve, args=(theirs, environment, self._log), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: Callable[..., Any], *, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls `function(**kwargs)` on every rank; results in order of rank.

        Raises:
            RankFailed: a rank raised, died, or did not answer within `timeout` seconds.
        """
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function.__module__, function.__qualname__, kwargs))
        results, failures, hung = [], [], False
        for rank, (process, connection) in enumerate(self._ranks):
            try:
                # Once a rank failed, the others may wait for it for ever.
                if not connection.poll(2.0 if failures else timeout):
                    hung = hung or not failures
                    failures.append(f"rank {rank} did not answer within {timeout} s")
                    continue
                ok, value = connection.recv()
            except EOFError:
                failures.append(f"rank {rank} died, exit code {process.exitcode}")
                continue
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            text = "\n".join(failures) + f"\noutput of the ranks:\n{self.output()[-4000:]}"
            self.close()
            raise RankFailed(text, results, hung)
        return results

    def output(self) -> str:
        """Everything that the ranks printed since they were started."""
        if not os.path.exists(self._log):
            return ""
        with open(self._log, errors="replace") as file:
            return file.read()

    def close(self) -> None:
        """Ends the ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join(10)  # one that waits for a driver cannot be killed at once
        self._ranks.clear()
