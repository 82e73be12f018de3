"""The small option objects that scripts pass to `Accelerator`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from zeroaccel.config import environment
from zeroaccel.config.types import DDPCommunicationHookType, DynamoBackend
from zeroaccel.errors import ConfigError


class KwargsHandler:
    """Base of the objects that `Accelerator(kwargs_handlers=[...])` takes."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


@dataclass
class AutocastKwargs(KwargsHandler):
    """Options of `torch.autocast`; without DeepSpeed only."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Options of DistributedDataParallel: accepted and without effect, DeepSpeed averages the gradients."""

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """Options of the fp16 gradient scaler without DeepSpeed."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """Options of the process group.

    Args:
        backend: "nccl", "gloo" ...; default: what the device uses.
        init_method: URL of the rendezvous.
        timeout: how long a collective may wait for a rank; default: PyTorch's.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | None = None


@dataclass
class ProfileKwargs(KwargsHandler):
    """Options of `torch.profiler.profile`.

    Args:
        activities: "cpu", "cuda".
        schedule_option: keyword arguments of `torch.profiler.schedule`.
        output_trace_dir: where traces go.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> Any:
        """The profiler.

        Raises:
            ConfigError: an activity that PyTorch does not have.
        """
        import torch.profiler

        known = {name.lower(): activity for name, activity in torch.profiler.ProfilerActivity.__members__.items()}
        if unknown := [name for name in self.activities or [] if name not in known]:
            raise ConfigError(f"profiler activities {unknown} are unknown: choose from {sorted(known)}")
        return torch.profiler.profile(
            activities=None if self.activities is None else [known[name] for name in self.activities],
            schedule=torch.profiler.schedule(**self.schedule_option) if self.schedule_option else None,
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How gradients are accumulated.

    Args:
        num_steps: micro-batches of an optimizer step.
        adjust_scheduler: accepted as in Accelerate, where it has no effect on the learning rate either.
        sync_with_dataloader: `accumulate()` closes the window at the end of the loader.
        sync_each_batch: accepted; a backward pass never communicates here, so nothing is saved by waiting.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False


@dataclass
class DataLoaderConfiguration:
    """How `prepare` shards loaders.

    Args:
        split_batches: the loader's batch size is that of all ranks together.
        dispatch_batches: rank 0 reads and hands out; None: for iterable datasets.
        even_batches: repeat samples so that every rank gets equally many batches.
        use_seedable_sampler: shuffle by a seed of its own.
        data_seed: that seed.
        non_blocking: move batches without waiting.
        use_stateful_dataloader: after `load_state` a loop goes on by itself where the interrupted one was.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False


@dataclass
class ProjectConfiguration:
    """Where a project's files go.

    Args:
        project_dir: root of checkpoints.
        logging_dir: root of logs; default: `project_dir`.
        automatic_checkpoint_naming: number the checkpoints.
        total_limit: how many of them to keep.
        iteration: number of the next one.
        save_on_each_node: save on every node instead of once.
    """

    project_dir: str | None = None
    logging_dir: str | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | None = None) -> None:
        """Sets `project_dir`, and `logging_dir` where it has none."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """How models are compiled; fields that are None come from `ZEROACCEL_DYNAMO_*`.

    Args:
        backend: of `torch.compile`; "no" compiles nothing.
        mode, fullgraph, dynamic, options, disable: of `torch.compile`.
        use_regional_compilation: compile the repeated blocks of a model one by one, and not the whole of it.

    Raises:
        ConfigError: a backend that is unknown.
    """

    backend: DynamoBackend | str | None = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        name = str(self.backend or environment.text("DYNAMO_BACKEND") or "no").upper()
        if name not in DynamoBackend:
            raise ConfigError(f"dynamo_backend={self.backend!r} is unknown: choose from {DynamoBackend.list()}")
        self.backend = DynamoBackend(name)
        self.mode = self.mode or environment.text("DYNAMO_MODE") or "default"
        if self.fullgraph is None:
            self.fullgraph = environment.flag("DYNAMO_USE_FULLGRAPH")
        if self.use_regional_compilation is None:
            self.use_regional_compilation = environment.flag("DYNAMO_USE_REGIONAL_COMPILATION")
        if self.dynamic is None and environment.lookup("DYNAMO_USE_DYNAMIC") is not None:
            self.dynamic = environment.flag("DYNAMO_USE_DYNAMIC")

    def compile_options(self) -> dict[str, Any] | None:
        """Keyword arguments of `torch.compile`; None where nothing is compiled."""
        assert isinstance(self.backend, DynamoBackend)
        if self.backend is DynamoBackend.NO:
            return None
        options = {"fullgraph": self.fullgraph, "dynamic": self.dynamic, "options": self.options}
        if self.mode != "default":  # PyTorch takes either a mode or options
            options["mode"] = self.mode
        return {"backend": self.backend.value.lower(), "disable": self.disable, **options}
