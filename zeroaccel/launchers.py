"""Starting a function on several ranks from Python: from a notebook, or on the CPU to see how it behaves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import start_processes

from zeroaccel.config import environment
from zeroaccel.config.env_patch import get_int_from_env, patch_environment
from zeroaccel.config.types import DistributedType, PrecisionType
from zeroaccel.engine.machine import is_rocm_available, is_xpu_available
from zeroaccel.errors import ConfigError, DistributedError, UsageError
from zeroaccel.state import AcceleratorState, GradientState

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig


def get_free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_port_in_use(port: int | None = None) -> bool:
    """Whether something listens on this port of this machine; None means 29500, where ranks meet by default."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", 29500 if port is None else port)) == 0


class PrepareForLaunch:
    """A function as one rank runs it, to be started by `torch.multiprocessing.start_processes`.

    `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, and on several nodes `NPROC` (ranks a node) and `NODE_RANK` must be set.

    Args:
        launcher: the function.
        distributed_type: "NO" runs it as a world of one, anything else as one of several ranks.
        debug: it is one of several ranks on the CPU.
    """

    def __init__(
        self, launcher: Callable[..., Any], distributed_type: DistributedType | str = "NO", debug: bool = False
    ) -> None:
        self.launcher = launcher
        self.distributed_type = DistributedType(distributed_type)
        self.debug = debug

    def __call__(self, index: int, *args: Any) -> None:
        """Runs the function as rank `index` of this node, and ends its process group."""
        variables = environment.exports({"cpu": True}) if self.debug else {}
        if self.debug or self.distributed_type != DistributedType.NO:
            first = get_int_from_env(["NPROC"], 1) * get_int_from_env(["NODE_RANK"], 0)
            variables |= {"LOCAL_RANK": str(index), "RANK": str(first + index)}
        with patch_environment(**variables):
            _run_rank(self.launcher, *args)


def _run_rank(function: Callable[..., Any], *args: Any) -> None:
    """Runs the function in a forked process, as a process of its own would."""
    # GNU OpenMP hangs in a child whose parent had its threads running, unless the child uses one only.
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with patch_environment(**{f"{environment.PREFIX}FORK_LAUNCHED": "true"}):
        function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Runs a function on several ranks on the CPU of this machine, for tests and debugging.

    Args:
        function: runs on every rank, in a fork of this process.
        args: its arguments.
        num_processes: number of ranks.

    Raises:
        ProcessRaisedException: a rank raised; the text holds its traceback.
        UsageError: this process has a process group.
    """
    _refuse_process_group("debug_launcher")
    with patch_environment(**_meeting_point(num_processes, "127.0.0.1", get_free_port())):
        start_processes(  # type: ignore[no-untyped-call]
            PrepareForLaunch(function, debug=True), args=tuple(args), nprocs=num_processes, start_method="fork"
        )


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Runs a training function on every device, from a notebook. A single process runs it right here.

    The `Accelerator` must be created inside the function, and nothing before it may use a GPU: ranks are forks.

    Args:
        function: the training function.
        args: its arguments.
        num_processes: ranks on this node; default: one a GPU, 1 without.
        mixed_precision: "no", "fp16", "bf16" or "fp8"; "no" leaves it to the `Accelerator`.
        use_port: port that the ranks meet on; on a single node a free one, where it is taken.
        master_addr: address of the first node.
        node_rank: number of this node, from 0.
        num_nodes: number of nodes.
        rdzv_backend, rdzv_endpoint, rdzv_conf, rdzv_id: rendezvous of `torchrun`.
        max_restarts: how often failed ranks are started again.
        monitor_interval: seconds between two looks at the ranks.
        log_line_prefix_template: prefix of the ranks' lines, as for `torchrun`.

    Raises:
        ConfigError: unknown precision, or a node that does not exist.
        UsageError: an Accelerator, a process group or CUDA is there already, which forks cannot share.
        DistributedError: a rank failed; the text holds its traceback.
    """
    if str(mixed_precision).lower() not in PrecisionType:
        raise ConfigError(f"mixed_precision={mixed_precision!r} is unknown: choose from {PrecisionType.list()}")
    if node_rank >= num_nodes:
        raise ConfigError(f"node_rank={node_rank} does not exist: {num_nodes} node(s) are numbered from 0")
    count = num_processes or max(1, torch.cuda.device_count())
    precision = None if mixed_precision == "no" else str(mixed_precision).lower()
    variables = environment.exports({"mixed_precision": precision})
    if count * num_nodes == 1:
        with patch_environment(**variables):
            function(*args)
        return
    start_method = "spawn" if is_xpu_available() or is_rocm_available() else "fork"
    _refuse_shared_state(start_method)
    port = get_free_port() if num_nodes == 1 and is_port_in_use(int(use_port)) else int(use_port)
    static = rdzv_backend == "static"
    config = _launch_config(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=count,
        run_id=rdzv_id,
        rdzv_backend=rdzv_backend,
        rdzv_endpoint=rdzv_endpoint or (f"{master_addr}:{port}" if static else ""),
        rdzv_configs={**(rdzv_conf or {}), **({"rank": node_rank} if static else {})},
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        start_method=start_method,
        log_line_prefix_template=log_line_prefix_template,
    )
    with patch_environment(**variables):
        _launch(config, function, args)


def _meeting_point(world_size: int, address: str, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _launch_config(**options: Any) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    # Looking for GPUs in the ordinary way would start CUDA here, and the forks could not use it.
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return LaunchConfig(**options)


def _launch(config: LaunchConfig, function: Callable[..., Any], args: Sequence[Any]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        elastic_launch(config, _run_rank)(function, *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A rank that raised sent its traceback; of one that was killed torch says how.
        told = failure.message
        text = told["extraInfo"]["py_callstack"] if isinstance(told, dict) else told
        raise DistributedError(f"rank {rank} of {function.__name__} failed:\n{text}") from error


def _refuse_process_group(caller: str) -> None:
    if torch.distributed.is_initialized():
        raise UsageError(
            f"{caller} forks this process, which has a process group that forks cannot use: end it before"
            " (`accelerator.end_training()`)"
        )


def _refuse_shared_state(start_method: str) -> None:
    _refuse_process_group("notebook_launcher")
    if AcceleratorState._shared_state:
        raise UsageError(
            "notebook_launcher needs a notebook without an Accelerator: create it inside the function, and restart the"
            " notebook"
        )
    if start_method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UsageError(
            "notebook_launcher forks this process, in which CUDA runs already, and forks cannot use it: restart the"
            " notebook, and touch the GPU inside the function only"
        )
