"""Who we are: ranks and device, what the run was configured to, and where the accumulation stands.

The three classes are views of one dictionary each (`_shared_state`), so every instance shows the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed
from torch._C._distributed_c10d import HashStore

from zeroaccel import logging as rank_logging
from zeroaccel.config import environment
from zeroaccel.config.types import DistributedType, PrecisionType
from zeroaccel.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from zeroaccel.config.options import GradientAccumulationPlugin
    from zeroaccel.config.plugin import DeepSpeedPlugin

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


class _Shared:
    """A view of the class's `_shared_state`."""

    _shared_state: ClassVar[dict[str, Any]] = {}

    @property
    def initialized(self) -> bool:
        """Whether the shared state holds anything yet."""
        return bool(self._shared_state)


class PartialState(_Shared):
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
            return
        self._cpu = cpu or environment.flag("USE_CPU")
        self.debug = environment.flag("DEBUG_MODE")
        self.fork_launched = environment.flag("FORK_LAUNCHED")
        self.backend = None
        self._group_options = dict(kwargs)
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
            if environment.launched_ranks() is None or (self.num_processes == 1 and not environment.has_master()):
                options.update(store=HashStore(), rank=0, world_size=1)
            torch.distributed.init_process_group(backend=backend, **options)
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

    def __getattr__(self, name: str) -> Any:
        if name in PartialState.__annotations__:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: its state was reset. Create `Accelerator()` again"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        """Returns once every rank is here. Nothing to wait for in a world of one."""
        if self.num_processes > 1:
            on_gpu = self.device.type == "cuda"
            torch.distributed.barrier(device_ids=[self.device.index] if on_gpu else None)

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
        length = _common_length(inputs)
        share, extra = divmod(length, self.num_processes)
        start = self.process_index * share + min(self.process_index, extra)
        stop = start + share + (1 if self.process_index < extra else 0)
        padded = share + (1 if extra else 0) if apply_padding else 0
        yield _share(inputs, start, stop, padded)

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


def _common_length(inputs: Any) -> int:
    if not isinstance(inputs, Mapping):
        return len(inputs)
    lengths = {key: len(value) for key, value in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"split_between_processes needs values of one length in a dict, got {lengths}")
    return next(iter(lengths.values()), 0)


def _share(values: Any, start: int, stop: int, padded: int) -> Any:
    if isinstance(values, Mapping):
        return type(values)({k: _share(v, start, stop, padded) for k, v in values.items()})  # type: ignore[call-arg]
    if hasattr(values, "select") and not isinstance(values, torch.Tensor):  # datasets.Dataset
        last = len(values) - 1
        return values.select([min(i, last) for i in range(start, max(stop, start + padded))])
    share = values[start:stop]
    missing = padded - len(share)
    if missing <= 0 or len(values) == 0:
        return share
    tail = values[-1:]
    if isinstance(values, torch.Tensor):
        return torch.cat([share.to(values.device)] + [tail] * missing)
    return share + tail * missing


class AcceleratorState(_Shared):
    """What the run was configured to, on top of `PartialState`, whose attributes it shows too.

    Made by `Accelerator`; scripts read it anywhere afterwards.

    Raises:
        ConfigError: made before any `Accelerator`, or asked for something else than the first one was.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    deepspeed_plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None
    distributed_type: DistributedType
    _mixed_precision: str

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            self._refuse_change(mixed_precision, cpu)
            return
        if not _from_accelerator:
            raise ConfigError("AcceleratorState is empty: create `accelerator = Accelerator()` before reading it")
        partial_state = PartialState(cpu, **kwargs)
        self.__dict__.update(PartialState._shared_state)
        self.deepspeed_plugins = None
        self.dynamo_plugin = dynamo_plugin
        if deepspeed_plugin is None:
            self._mixed_precision = mixed_precision or environment.text("MIXED_PRECISION") or PrecisionType.NO.value
        else:
            self._enable_deepspeed(partial_state, deepspeed_plugin, mixed_precision)
        PartialState._shared_state["distributed_type"] = self.distributed_type

    def _enable_deepspeed(
        self,
        partial_state: PartialState,
        plugins: DeepSpeedPlugin | dict[str, DeepSpeedPlugin],
        mixed_precision: str | None,
    ) -> None:
        setting = environment.lookup("MIXED_PRECISION")
        wanted = mixed_precision or (setting.value if setting else PrecisionType.NO.value)
        self._mixed_precision = "fp8" if wanted == "fp8" else "no"  # else read from the plugin's config
        for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
            plugin.set_mixed_precision(wanted)
        partial_state.start_process_group()
        self.__dict__.update(PartialState._shared_state)
        self.distributed_type = DistributedType.DEEPSPEED
        self.deepspeed_plugins = plugins
        first = next(iter(plugins.values())) if isinstance(plugins, dict) else plugins
        first.select(_from_accelerator_state=True)

    def _refuse_change(self, mixed_precision: str | None, cpu: bool) -> None:
        remedy = "restart the process, or pass it to the first `Accelerator(...)`"
        if cpu and self.device.type != "cpu":
            raise ConfigError(f"cpu=True comes too late, the run is on {self.device} already: {remedy}")
        fixed = self.distributed_type != DistributedType.DEEPSPEED
        if fixed and mixed_precision is not None and mixed_precision != self._mixed_precision:
            raise ConfigError(
                f"mixed_precision={mixed_precision!r} comes too late, the run has {self._mixed_precision!r}: {remedy}"
            )

    def __getattr__(self, name: str) -> Any:
        # Methods and properties of PartialState, on the same processes.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(PartialState(), name)

    def __repr__(self) -> str:
        shown = f"{PartialState()!r}\nMixed precision type: {self.mixed_precision}\n"
        plugin = self.deepspeed_plugin
        return shown if plugin is None else f"{shown}ds_config: {plugin.deepspeed_config}\n"

    @property
    def mixed_precision(self) -> str:
        """`"no"`, `"fp16"`, `"bf16"` or `"fp8"`, as DeepSpeed runs it."""
        plugin = self.deepspeed_plugin
        if plugin is None or self._mixed_precision == PrecisionType.FP8:
            return self._mixed_precision
        for name in ("fp16", "bf16"):
            if plugin.deepspeed_config.get(name, {}).get("enabled", False) is True:
                return name
        return PrecisionType.NO.value

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The selected plugin; None without DeepSpeed."""
        if self.__dict__.get("distributed_type") != DistributedType.DEEPSPEED:
            return None
        return get_active_deepspeed_plugin(self)

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """The plugin of that name, where `Accelerator(deepspeed_plugins={...})` has several."""
        return self._named_plugins()[name]

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Makes the plugin of that name the one that the next `prepare()` uses."""
        plugins = self._named_plugins()
        if name not in plugins:
            raise ConfigError(f"no DeepSpeed plugin is called {name!r}; there are {sorted(plugins)}")
        for other in plugins.values():
            other._unselect()
        plugins[name].select(_from_accelerator_state=True)

    def _named_plugins(self) -> dict[str, DeepSpeedPlugin]:
        if not isinstance(self.deepspeed_plugins, dict):
            raise ConfigError("the run has no named plugins: pass `Accelerator(deepspeed_plugins={'name': plugin})`")
        return self.deepspeed_plugins

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()


def get_active_deepspeed_plugin(state: AcceleratorState) -> DeepSpeedPlugin:
    """The selected plugin of `state`.

    Raises:
        ConfigError: the run is not on DeepSpeed.
    """
    plugins = state.__dict__.get("deepspeed_plugins")
    if plugins is None:
        raise ConfigError(
            "there is no DeepSpeed plugin: pass `Accelerator(deepspeed_plugin=DeepSpeedPlugin(...))`"
            " or start with `zeroaccel launch --use_deepspeed`"
        )
    candidates: list[DeepSpeedPlugin] = list(plugins.values()) if isinstance(plugins, dict) else [plugins]
    return next(plugin for plugin in candidates if plugin.selected)


class GradientState(_Shared):
    """Where the gradient accumulation and the active loader stand.

    Loaders publish here (`_add_dataloader`, `_batch_drawn`, `_epoch_ended`), the accumulation window reads.

    Attributes:
        sync_gradients: whether this micro-batch closes its accumulation window.
        batches_drawn: batches that prepared loaders yielded so far, all loaders together.
        plugin_kwargs: the changed fields of the `GradientAccumulationPlugin`.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    plugin_kwargs: dict[str, Any]
    batches_drawn: int
    script_cuts: bool
    _sync_gradients: bool
    _references: list[weakref.ReferenceType[Any]]
    _epoch_end_hooks: list[Callable[[], None]]

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self._sync_gradients = True
            self.script_cuts = False
            self.plugin_kwargs = {}
            self.batches_drawn = 0
            self._references = []
            self._epoch_end_hooks = []
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    @property
    def num_steps(self) -> int:
        """Micro-batches in a full accumulation window."""
        return int(self.plugin_kwargs.get("num_steps", 1))

    @property
    def adjust_scheduler(self) -> bool:
        """Whether a scheduler counts the micro-batches between two optimizer steps."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", False))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether `accumulate()` closes the window at the end of the loader."""
        return bool(self.plugin_kwargs.get("sync_with_dataloader", True))

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch closes its window."""
        return self._sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        # The script cuts its windows itself from now on (DESIGN.md, semantics 2).
        self.script_cuts = True
        self._sync_gradients = bool(value)

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        """What `transformers.Trainer` calls to cut its windows."""
        self.sync_gradients = sync_gradients

    def _mirror_sync_gradients(self, sync_gradients: bool) -> None:
        """The library's own count, shown to the script."""
        self._sync_gradients = sync_gradients

    @property
    def dataloader_references(self) -> list[Any]:
        """Loaders that are being iterated, innermost last; `[None]` outside of all."""
        return [None, *(loader for reference in self._references if (loader := reference()) is not None)]

    @property
    def active_dataloader(self) -> Any:
        """The innermost loader that is being iterated, or None."""
        return self.dataloader_references[-1]

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the active loader's current batch is its last."""
        loader = self.active_dataloader
        return False if loader is None else bool(loader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """Real samples in the active loader's last global batch; 0 if it is full, -1 if unknown."""
        loader = self.active_dataloader
        return -1 if loader is None else int(loader.remainder)

    def _add_dataloader(self, dataloader: Any) -> None:
        self._references = [*self._references, weakref.ref(dataloader)]

    def _remove_dataloader(self, dataloader: Any) -> None:
        self._references = [r for r in self._references if r() is not None and r() is not dataloader]

    def _batch_drawn(self) -> None:
        self.batches_drawn += 1

    def _epoch_ended(self) -> None:
        for hook in self._epoch_end_hooks:
            hook()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        GradientState._shared_state.clear()


def _known_ranks() -> PartialState | None:
    return PartialState() if PartialState._shared_state else None


rank_logging.set_rank_source(_known_ranks)
