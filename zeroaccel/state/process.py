"""Ranks, device and process group of this process."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed
from torch._C._distributed_c10d import HashStore

from zeroaccel import logging as rank_logging
from zeroaccel.config import environment
from zeroaccel.config.types import DistributedType
from zeroaccel.errors import ConfigError, EnvironmentProblem
from zeroaccel.state.meeting import meet
from zeroaccel.state.shared import Shared
from zeroaccel.state.splitting import share_of

logger = rank_logging.library_logger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """What a decorated function becomes on a rank that it is not for."""


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, XPU, MPS ...), else the CPU."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    found = torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    if found is None and torch.cuda.is_available():
        found = torch.device("cuda")
    return torch.device("cpu") if found is None else torch.device(found.type)


class PartialState(Shared):
    """Ranks, device and process group of this process; helpers to run code on some ranks only.

    Args:
        cpu: stay on the CPU (backend gloo) even if the machine has an accelerator.
        backend: process-group backend; default: nccl (or the device's own) on accelerators, gloo on CPUs.
        timeout, init_method, ...: passed on to `torch.distributed.init_process_group`.

    Attributes:
        device: `torch.device` of this rank.
        num_processes: world size.
        process_index: rank.
        local_process_index: rank on this node.
        distributed_type: a `DistributedType`.
        backend: name of the process group's backend, None without one.

    Raises:
        ConfigError: the backend that was asked for is not available.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    device: torch.device
    num_processes: int
    process_index: int
    local_process_index: int
    distributed_type: DistributedType
    backend: str | None
    debug: bool
    fork_launched: bool
    _cpu: bool
    _group_options: dict[str, Any]

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            self._take_late_options(kwargs)
            return
        try:
            self._find_out(cpu, kwargs)
        except BaseException:  # half a state would pass for a whole one
            self._shared_state.clear()
            raise

    def _find_out(self, cpu: bool, group_options: dict[str, Any]) -> None:
        self._cpu = cpu or environment.flag("USE_CPU")
        self.debug = environment.flag("DEBUG_MODE")
        self.fork_launched = environment.flag("FORK_LAUNCHED")
        self.backend = None
        self._group_options = group_options
        ranks = environment.launched_ranks() or environment.Ranks(0, 1, 0, 1)
        self.num_processes, self.process_index = ranks.world_size, ranks.rank
        self.local_process_index = ranks.local_rank
        self.device = self._choose_device()
        self.distributed_type = DistributedType.NO
        if ranks.world_size > 1:
            self.start_process_group()
            self.distributed_type = {
                "cuda": DistributedType.MULTI_GPU,
                "xpu": DistributedType.MULTI_XPU,
                "npu": DistributedType.MULTI_NPU,
            }.get(self.device.type, DistributedType.MULTI_CPU)

    def _take_late_options(self, group_options: dict[str, Any]) -> None:
        if self.backend is None:
            self._group_options = {**self._group_options, **group_options}
        elif group_options and group_options != self._group_options:
            logger.warning(
                f"{group_options} come too late, the process group exists already: pass them to the first"
                " `PartialState(...)` or `Accelerator(...)` of the script"
            )

    def _choose_device(self) -> torch.device:
        wanted = environment.text("TORCH_DEVICE")
        device = torch.device("cpu") if self._cpu else torch.device(wanted) if wanted else best_device()
        if device.type == "cuda" and device.index is None:
            visible = torch.cuda.device_count()
            if self.num_processes > 1 and self.local_process_index >= visible:
                raise EnvironmentProblem(
                    f"local rank {self.local_process_index} has no GPU of its own: {visible} visible on this node."
                    f" Start at most {visible} processes a node, or use the CPU (cpu=True, `zeroaccel launch --cpu`)"
                )
            device = torch.device("cuda", self.local_process_index if self.num_processes > 1 else 0)
            torch.cuda.set_device(device)
        return device

    def start_process_group(self) -> None:
        """Makes the default process group if there is none yet; a world of one needs no launcher for it."""
        options = dict(self._group_options)
        default = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl"}.get(self.device.type, "gloo")
        backend = options.pop("backend", None) or default
        if not torch.distributed.is_initialized():
            if not torch.distributed.is_backend_available(backend):
                raise ConfigError(
                    f"the backend {backend!r} is not available here; {default!r} is what this device uses"
                )
            ranks = environment.Ranks(
                self.process_index, self.num_processes, self.local_process_index, self.num_processes
            )
            environment.announce_ranks(ranks)
            options.update(rank=ranks.rank, world_size=ranks.world_size)
            if ranks.world_size == 1 and not environment.has_master() and "init_method" not in options:
                options["store"] = HashStore()
            torch.distributed.init_process_group(backend=backend, **options)
            if "gloo" in backend:
                # torch 2.13: a gloo thread that lets go of the last collective's tensor while Python ends aborts.
                atexit.register(time.sleep, 0.05)
        self.backend = torch.distributed.get_backend()
        self.num_processes = torch.distributed.get_world_size()
        self.process_index = torch.distributed.get_rank()

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        return (
            f"Distributed environment: {self.distributed_type}{backend}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        PartialState._shared_state.clear()

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.distributed_type != DistributedType.NO and self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is rank 0 of its node."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        """Device that would be chosen without `cpu=True`."""
        return best_device()

    def wait_for_everyone(self) -> None:
        """Returns once every rank is here. Nothing to wait for in a world of one.

        Raises:
            DistributedError: a rank did not come in time, or came to another call.
        """
        meet(self, "wait_for_everyone")

    @contextmanager
    def _goes_first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        finally:  # an exception on the first rank must not leave the others waiting
            if first:
                self.wait_for_everyone()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others enter it."""
        with self._goes_first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first rank of each node runs the block before the node's others enter it."""
        with self._goes_first(self.is_local_main_process):
            yield

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This rank's share of `inputs`, for inference with different prompts on each rank.

        Args:
            inputs: list, tuple, tensor, `datasets.Dataset`, or a dict of these, all of one length.
            apply_padding: repeat the last element so that every rank gets equally many.

        Raises:
            ConfigError: the dict's values have different lengths.
        """
        if self.num_processes == 1:
            yield inputs
            return
        yield share_of(inputs, self.process_index, self.num_processes, apply_padding)

    def on_main_process(self, function: Function | None = None) -> Any:
        """Decorator: runs on rank 0 only, does nothing on the others."""
        if not self.initialized:
            raise ConfigError("create `PartialState()` or `Accelerator()` before using on_main_process")
        return function if self.is_main_process or not self.use_distributed else do_nothing

    def on_local_main_process(self, function: Function | None = None) -> Any:
        """Decorator: runs on the first rank of each node only."""
        return function if self.is_local_main_process or not self.use_distributed else do_nothing

    def on_last_process(self, function: Function) -> Any:
        """Decorator: runs on the highest rank only."""
        return function if self.is_last_process or not self.use_distributed else do_nothing

    def on_process(self, function: Function | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on one rank only. Also as `@on_process(process_index=2)`."""
        if function is None:
            return partial(self.on_process, process_index=process_index)
        return function if self.process_index == process_index or not self.use_distributed else do_nothing

    def on_local_process(self, function: Function | None = None, local_process_index: int | None = None) -> Any:
        """Decorator: runs on one rank of each node only."""
        if function is None:
            return partial(self.on_local_process, local_process_index=local_process_index)
        here = self.local_process_index == local_process_index
        return function if here or not self.use_distributed else do_nothing

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print`, once a node."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def set_device(self) -> None:
        """Kept for scripts that call it; the device was chosen when the state was made."""

    def destroy_process_group(self, group: Any = None) -> None:
        """Ends `group`, or the default process group, if there is one."""
        if self.fork_launched and group is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(group)


def _known_ranks() -> PartialState | None:
    return PartialState() if PartialState._shared_state else None


rank_logging.set_rank_source(_known_ranks)
