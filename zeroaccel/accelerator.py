"""`Accelerator`: the vocabulary of the training loop. Every word is carried out by a room to the left of this one."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from zeroaccel.checkpoint import export, files
from zeroaccel.checkpoint.contents import Contents
from zeroaccel.checkpoint.preemption import Preemption
from zeroaccel.checkpoint.state import Checkpoints, check_registrable
from zeroaccel.config import environment
from zeroaccel.config.options import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.precedence import Level, Said, settle, warn_losers
from zeroaccel.config.types import DistributedType, FP8BackendType, PrecisionType
from zeroaccel.data_loader import prepare_data_loader, skip_first_batches
from zeroaccel.data_loader.joint import even_batches_set
from zeroaccel.distributed import operations
from zeroaccel.engine import gathering
from zeroaccel.engine.arguments import Kind, kind_of, mark_prepared
from zeroaccel.engine.backend import Setup, make_backend
from zeroaccel.engine.masters import Share
from zeroaccel.engine.optimizer import AcceleratedOptimizer, DeepSpeedOptimizerWrapper
from zeroaccel.engine.scheduler import AcceleratedScheduler
from zeroaccel.engine.unwrap import extract_model_from_parallel
from zeroaccel.engine.wrapper import DeepSpeedEngineWrapper
from zeroaccel.errors import ConfigError, ConfigTypeError, UnsupportedError
from zeroaccel.state import AcceleratorState, GradientState, PartialState
from zeroaccel.tracking import running
from zeroaccel.tracking.register import filter_trackers

if TYPE_CHECKING:
    from zeroaccel.config.facts import ResolvedConfig

Plugins = DeepSpeedPlugin | dict[str, DeepSpeedPlugin]


def _refuse_other_strategies(**strategies: Any) -> None:
    named = sorted(name for name, value in strategies.items() if value is not None)
    if named:
        raise UnsupportedError(f"{', '.join(named)}: this library trains with DeepSpeed ZeRO only; leave it out")


def _check_plugins(plugin: Plugins | None, plugins: Plugins | None) -> Plugins | None:
    """The plugin or plugins that the script passed, checked."""
    if plugin is not None and plugins is not None:
        raise ConfigError("deepspeed_plugin and deepspeed_plugins were both passed: pass one of them")
    given = plugin if plugin is not None else plugins
    for each in given.values() if isinstance(given, dict) else [given] if given is not None else []:
        if not isinstance(each, DeepSpeedPlugin):
            raise ConfigTypeError(f"deepspeed_plugin must be a DeepSpeedPlugin, got {type(each).__name__}")
    return given


def _choose_plugins(given: Plugins | None) -> tuple[Plugins | None, bool]:
    """The plugins of this run, and whether DeepSpeed was chosen only because there are several processes."""
    existing = AcceleratorState._shared_state.get("deepspeed_plugins")
    if given is not None and existing is not None and given is not existing:
        raise UnsupportedError(
            "a second Accelerator shares the plugins of the first: pass all of them to the first one,"
            " as deepspeed_plugins={'name': plugin, ...}"
        )
    if given is not None or existing is not None:
        return (given if existing is None else existing), False
    if environment.flag("USE_DEEPSPEED"):
        return DeepSpeedPlugin(), False
    ranks = environment.launched_ranks()
    if ranks is not None and ranks.world_size > 1:
        return DeepSpeedPlugin(zero_stage=0), True
    return None, False


def _checked_precision(mixed_precision: PrecisionType | str | None) -> str | None:
    if mixed_precision is not None and str(mixed_precision) not in PrecisionType:
        raise ConfigError(f"mixed_precision={mixed_precision!r} is unknown: choose from {PrecisionType.list()}")
    return None if mixed_precision is None else str(mixed_precision)


def _sort_handlers(handlers: list[KwargsHandler] | None) -> dict[type, KwargsHandler]:
    found: dict[type, KwargsHandler] = {}
    for handler in handlers or []:
        if not isinstance(handler, KwargsHandler):
            raise ConfigTypeError(f"kwargs_handlers takes KwargsHandler objects, got {type(handler).__name__}")
        if type(handler) in found:
            raise ConfigError(f"kwargs_handlers holds two {type(handler).__name__}: pass one")
        found[type(handler)] = handler
    return found


def _options_of(handler: Any) -> dict[str, Any]:
    return {} if handler is None else handler.to_kwargs()


def _checked_steps(steps: Any) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"gradient_accumulation_steps={steps!r}: write a whole number of at least 1")
    return steps


def _accumulation_plugin(
    steps: int, plugin: GradientAccumulationPlugin | None
) -> tuple[GradientAccumulationPlugin | None, bool]:
    """What to accumulate before `prepare()` (None: what the first one said), and whether the script typed it."""
    if plugin is not None and steps != 1:
        raise ConfigError(
            f"gradient_accumulation_steps={steps} and a gradient_accumulation_plugin were both passed: pass one of them"
        )
    typed = plugin is not None or steps != 1
    if not typed and GradientState._shared_state:
        return None, False
    plugin = plugin or GradientAccumulationPlugin(num_steps=steps)
    _checked_steps(1 if plugin.num_steps is None else plugin.num_steps)
    return plugin, typed


def _held_accumulation(steps: int, typed: bool, plugin: DeepSpeedPlugin | None) -> int:
    """The script's number, unless the DeepSpeed plugin has one, or without that the launcher: then it is named."""
    key = "gradient_accumulation_steps"
    said = [Said(steps, Level.ACCELERATOR if typed else Level.RULE, "Accelerator")]
    setting = environment.lookup(environment.FIELDS[key])
    if plugin is not None and isinstance(plugin.gradient_accumulation_steps, int):
        said.append(Said(plugin.gradient_accumulation_steps, Level.PLUGIN, plugin.source_of(key)))
    elif setting is not None and setting.value != "auto":
        launched = environment.parse_whole(setting.value, setting.variable, lowest=1)
        said.append(Said(launched, Level.LAUNCHER, setting.variable))
    held, losers = settle(key, said)
    warn_losers(losers)
    return int(held.value)


class Accelerator:
    """Runs a PyTorch training loop on DeepSpeed ZeRO, or on plain PyTorch where there is nothing to shard.

    Args:
        device_placement: move models and batches to the device (without DeepSpeed, which always does).
        split_batches: the loader's batch size is that of all ranks together.
        mixed_precision: "no", "fp16", "bf16" or "fp8"; beats the launcher's.
        gradient_accumulation_steps: micro-batches of an optimizer step; a number in the DeepSpeed config, the plugin
            or the launcher beats it.
        cpu: train on the CPU even if there is a GPU.
        dataloader_config: how loaders are sharded.
        deepspeed_plugin, deepspeed_plugins: a plugin, or several by name.
        rng_types: generators kept in step over the ranks; default `["generator"]`.
        log_with: experiment trackers: names such as "tensorboard", "wandb", "all" for those that are installed, or
            `GeneralTracker` objects.
        project_dir, project_config: where checkpoints and logs go.
        gradient_accumulation_plugin: accumulation with its finer options.
        step_scheduler_with_optimizer: False steps a scheduler at every call.
        kwargs_handlers: options for the process group, autocast, the gradient scaler.
        dynamo_backend, dynamo_plugin: `torch.compile`.

    Raises:
        ConfigError: arguments that contradict each other, or come too late.
        UnsupportedError: another strategy than ZeRO.
    """

    # Scripts with a branch for each strategy ask for these.
    parallelism_config = None
    torch_device_mesh = None
    is_fsdp2 = False
    is_composable_parallelism_enabled = False
    fp8_backend = FP8BackendType.NO

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = False,
        mixed_precision: PrecisionType | str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: Plugins | None = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: list[str] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[KwargsHandler] | None = None,
        dynamo_backend: str | None = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugins: Plugins | None = None,
        parallelism_config: Any = None,
    ) -> None:
        _refuse_other_strategies(
            fsdp_plugin=fsdp_plugin,
            torch_tp_plugin=torch_tp_plugin,
            megatron_lm_plugin=megatron_lm_plugin,
            parallelism_config=parallelism_config,
        )
        self._read_project(project_dir, project_config)
        self._read_handlers(kwargs_handlers)
        plugins, implicit = _choose_plugins(_check_plugins(deepspeed_plugin, deepspeed_plugins))
        self._make_state(mixed_precision, cpu, plugins, dynamo_backend, dynamo_plugin)
        accumulation, typed = _accumulation_plugin(gradient_accumulation_steps, gradient_accumulation_plugin)
        self.gradient_state = GradientState(gradient_accumulation_plugin=accumulation)
        self.gradient_state.plugin_kwargs["num_steps"] = _held_accumulation(
            self.gradient_state.num_steps, typed, self.deepspeed_plugin
        )
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        if split_batches:
            self.dataloader_config.split_batches = True
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.rng_types = ["generator"] if rng_types is None else rng_types
        self.log_with = filter_trackers(log_with, self.logging_dir)
        self.trackers: list[Any] = []
        self._trackers_ended = False
        self._reset_loop()
        self._backend = make_backend(self._setup(typed, implicit), self.state, self.gradient_state)
        self._checkpoints = Checkpoints(self.project_configuration)
        self._preemption = Preemption()

    # --- construction -------------------------------------------------------------------------------------------

    def _read_project(self, project_dir: str | os.PathLike[str] | None, config: ProjectConfiguration | None) -> None:
        directory = None if project_dir is None else os.fspath(project_dir)
        self.project_configuration = config or ProjectConfiguration(project_dir=directory)
        if directory is not None and self.project_configuration.project_dir is None:
            self.project_configuration.set_directories(directory)

    def _read_handlers(self, handlers: list[KwargsHandler] | None) -> None:
        found = _sort_handlers(handlers)
        self.ddp_handler = found.get(DistributedDataParallelKwargs)
        self.scaler_handler = found.get(GradScalerKwargs)
        self.init_handler = found.get(InitProcessGroupKwargs)
        self.autocast_handler = found.get(AutocastKwargs)
        profiling = found.get(ProfileKwargs)
        self.profile_handler = profiling if isinstance(profiling, ProfileKwargs) else ProfileKwargs()

    def _make_state(
        self,
        mixed_precision: PrecisionType | str | None,
        cpu: bool,
        plugins: Plugins | None,
        dynamo_backend: str | None,
        dynamo_plugin: TorchDynamoPlugin | None,
    ) -> None:
        if dynamo_backend is not None and dynamo_plugin is not None:
            raise ConfigError("dynamo_backend and dynamo_plugin were both passed: pass one of them")
        self.state = AcceleratorState(
            mixed_precision=_checked_precision(mixed_precision),
            cpu=cpu,
            dynamo_plugin=dynamo_plugin or TorchDynamoPlugin(backend=dynamo_backend),
            deepspeed_plugin=plugins,
            _from_accelerator=True,
            **_options_of(self.init_handler),
        )

    def _reset_loop(self) -> None:
        self.step = 0
        self.deepspeed_engine_wrapped: DeepSpeedEngineWrapper | None = None  # the first engine that trains
        self.flag_tensor: torch.Tensor | None = None
        self._models: list[Any] = []
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._dataloaders: list[Any] = []
        self._custom_objects: list[Any] = []

    def _setup(self, accumulation_typed: bool, implicit_plugin: bool) -> Setup:
        return Setup(
            prepare_loader=self.prepare_data_loader,
            device_placement=self.device_placement,
            split_batches=self.split_batches,
            step_scheduler_with_optimizer=self.step_scheduler_with_optimizer,
            accumulation_typed=accumulation_typed,
            implicit_plugin=implicit_plugin,
            scaler_options=_options_of(self.scaler_handler),
            autocast_options=_options_of(self.autocast_handler),
        )

    # --- what this process is -----------------------------------------------------------------------------------

    @property
    def scaler(self) -> Any:
        """Gradient scaler of fp16 without DeepSpeed, else None."""
        return self._backend.scaler

    @property
    def native_amp(self) -> bool:
        """Whether mixed precision is PyTorch's autocast, as it is without DeepSpeed."""
        return self.deepspeed_plugin is None and self.mixed_precision != PrecisionType.NO

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.state.device  # type: ignore[no-any-return]

    @property
    def distributed_type(self) -> DistributedType:
        """`DEEPSPEED`, or `NO` on plain PyTorch."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """World size."""
        return int(self.state.num_processes)

    @property
    def process_index(self) -> int:
        """Rank."""
        return int(self.state.process_index)

    @property
    def local_process_index(self) -> int:
        """Rank on this node."""
        return int(self.state.local_process_index)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return PartialState().is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is rank 0 of its node."""
        return PartialState().is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return PartialState().is_last_process

    @property
    def should_save_model(self) -> bool:
        """Whether this rank writes files for all, as rank 0 does."""
        return self.is_main_process

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return PartialState().use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether there is more than one process, each with a device."""
        return self.use_distributed

    @property
    def mixed_precision(self) -> str:
        """`"no"`, `"fp16"`, `"bf16"` or `"fp8"`, as it runs."""
        return self.state.mixed_precision

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The selected plugin, None without DeepSpeed."""
        return self.state.deepspeed_plugin

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """The DeepSpeed config; after `prepare()` with every value that runs."""
        plugin = self.deepspeed_plugin
        return None if plugin is None else plugin.deepspeed_config

    @property
    def project_dir(self) -> str | None:
        """Where the project's files go."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Where logs go."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """Number of the next automatically named checkpoint."""
        return self.project_configuration.iteration

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch size is that of all ranks together."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads and hands out; None decides by loader."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether every rank gets equally many batches."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether shuffling follows a seed of its own."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether batches are moved without waiting."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether loaders keep their position."""
        return self.dataloader_config.use_stateful_dataloader

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: runs on rank 0 only."""
        return PartialState().on_main_process(function)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: runs on the first rank of each node only."""
        return PartialState().on_local_main_process(function)

    def on_last_process(self, function: Callable[..., Any]) -> Any:
        """Decorator: runs on the highest rank only."""
        return PartialState().on_last_process(function)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: runs on one rank only."""
        return PartialState().on_process(function, process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: runs on one rank of each node only."""
        return PartialState().on_local_process(function, local_process_index)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Rank 0 runs the block before the others."""
        return PartialState().main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The first rank of each node runs the block before the others there."""
        return PartialState().local_main_process_first()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """This rank's share of `inputs`; see `PartialState.split_between_processes`."""
        return PartialState().split_between_processes(inputs, apply_padding)

    def wait_for_everyone(self) -> None:
        """Returns once every rank is here."""
        PartialState().wait_for_everyone()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print`, once a node."""
        PartialState().print(*args, **kwargs)

    # --- prepare ------------------------------------------------------------------------------------------------

    def zero_init(self) -> AbstractContextManager[None]:
        """Any PyTorch model built inside is born partitioned at stage 3; below, and without DeepSpeed, does nothing.

        The weights are those that the model would have without the block, with rank 0's seed. Collective at stage 3.

            with accelerator.zero_init():
                model = Model()
        """
        plugin = self.deepspeed_plugin
        at_stage_3 = plugin is not None and plugin.zero_stage == 3
        return plugin.zero3_init_context_manager(enable=True) if plugin and at_stage_3 else contextlib.nullcontext()

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepares models, optimizers, loaders and schedulers, in any order and subset.

        Args:
            args: the objects; what is none of these, and what was prepared before, comes back untouched.
            device_placement: one flag an object, without DeepSpeed only.

        Returns:
            What became of them, in the caller's order; a single object not in a tuple.

        Raises:
            ConfigError: what cannot work, with the remedy.
        """
        if device_placement is not None and len(device_placement) != len(args):
            raise ConfigError(
                f"device_placement has {len(device_placement)} flags for {len(args)} objects: give one each"
            )
        result = self._backend.prepare(args, device_placement)
        for value in result:
            self._wrap_engine(value)
            self._register(value)
        return result if len(result) > 1 else result[0]

    def _register(self, value: Any) -> None:
        if not getattr(value, "_is_accelerate_prepared", False):
            return
        for kind, known in (
            (torch.nn.Module, self._models),
            (AcceleratedOptimizer, self._optimizers),
            (AcceleratedScheduler, self._schedulers),
            (DataLoader, self._dataloaders),
        ):
            if isinstance(value, kind) and not any(value is other for other in known):
                known.append(value)

    def _wrap_engine(self, value: Any) -> None:
        if isinstance(value, DeepSpeedOptimizerWrapper) and not self._optimizers:
            self.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(value.engine)
        elif self.deepspeed_engine_wrapped is None and self.deepspeed_plugin and hasattr(value, "zero_optimization"):
            self.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(value)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """Prepares one model. With `evaluation_mode` below stage 3 it is only moved to the device."""
        plugin = self.deepspeed_plugin
        if evaluation_mode and plugin is not None and plugin.zero_stage != 3:
            return model.to(self.device)
        return self.prepare(model, device_placement=None if device_placement is None else [device_placement])

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """Prepares one optimizer; under DeepSpeed it must come with its model, in one `prepare()` call."""
        return self.prepare(optimizer, device_placement=None if device_placement is None else [device_placement])

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepares a scheduler whose optimizer was prepared before."""
        if kind_of(scheduler) is not Kind.SCHEDULER:
            return scheduler
        prepared = self._backend.prepare_scheduler(scheduler)
        self._register(prepared)
        return prepared

    def prepare_data_loader(
        self,
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Shards one loader over the ranks and moves its batches to the device.

        Args:
            data_loader: a prepared one comes back untouched.
            device_placement: move the batches; default: as the Accelerator was told.
            slice_fn_for_dispatch: how rank 0 cuts a batch for the others, with `dispatch_batches`.
        """
        if getattr(data_loader, "_is_accelerate_prepared", False):
            self._register(data_loader)
            return data_loader
        placed = self.device_placement if device_placement is None else device_placement
        shared = {"put_on_device": placed, "rng_types": list(self.rng_types), **vars(self.dataloader_config)}
        prepared = prepare_data_loader(data_loader, self.device, slice_fn_for_dispatch=slice_fn_for_dispatch, **shared)
        self._register(mark_prepared(prepared))
        return prepared

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> Any:
        """The loader without its first `num_batches` batches, for one epoch."""
        return skip_first_batches(dataloader, num_batches=num_batches)

    def explain(self) -> ResolvedConfig | None:
        """Prints, on rank 0, every value that the newest `prepare()` resolved, with source and reason.

        Returns:
            The same as data; None without DeepSpeed or before `prepare()`.
        """
        resolved = self._backend.explanation()
        if resolved is not None:
            self.print(resolved.table())
        return resolved

    # --- the loop -----------------------------------------------------------------------------------------------

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        self.gradient_state.plugin_kwargs["num_steps"] = _checked_steps(steps)
        self._backend.follow_accumulation()

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch closes its accumulation window; a script that assigns it cuts its windows itself."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state.sync_gradients = sync_gradients

    def _at_loaders_end(self) -> bool:
        return self.gradient_state.sync_with_dataloader and self.gradient_state.end_of_dataloader

    def _do_sync(self) -> None:
        at_end = self._at_loaders_end()
        self.step = 0 if at_end else self.step + 1
        self.gradient_state._mirror_sync_gradients(at_end or self.step % self.gradient_accumulation_steps == 0)

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """One micro-batch: `step`, `zero_grad` and the scheduler act in the last block of each window only.

        The window closes after `gradient_accumulation_steps` blocks and at the end of the loader.

        Args:
            models: whose window it is; where models train in turn, each counts the blocks that name it. None: of all.
        """
        self._do_sync()
        with self._backend.accumulation(models, self._at_loaders_end()):
            yield

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Kept for scripts: a backward pass only accumulates here, so there is nothing to hold back."""
        yield

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: Any) -> Iterator[None]:
        """Kept for scripts: gradients are averaged when the window closes."""
        yield

    @contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """For loops in which ranks have different numbers of batches.

        Ranks that ran out take part in training and in stage 3 until the last one is through, with or without this
        block: they get their last batch again, `backward` counts it as zero, `gather_for_metrics` leaves it out, and
        `accelerator.gradient_state.filler` is true.

        Args:
            joinables: accepted as in Accelerate.
            even_batches: overrides that of the prepared map-style loaders within the block; None leaves it.
        """
        with even_batches_set(self._dataloaders, even_batches):
            yield

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Accumulates the gradients of `loss`, divided by the gradient accumulation steps. Updates nothing.

        Args:
            loss: scalar.
            kwargs: `retain_graph`; `scale_wrt_gas=False` for a loss that is scaled already; `weight=n` for a loss
                that is the mean over n tokens: the step is then on the mean over all tokens of the accumulation
                window and of all ranks.
        """
        self._backend.backward(loss, **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """Clips the coming step's gradients to `max_norm` (0: not at all) and returns their norm before."""
        return self._backend.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamps every gradient element of the coming step to [-clip_value, clip_value]."""
        self._backend.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divides the gradients by the fp16 scaler's factor, before reading them; DeepSpeed needs no call."""
        chosen = [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        self._backend.unscale_gradients(list(chosen))

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Mixed precision for code outside the model; nothing under DeepSpeed, whose models are in 16 bit."""
        handler = autocast_handler or self.autocast_handler
        with self._backend.autocast(handler.to_kwargs() if handler else None):
            yield

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[Any]:
        """Profiles the block with `torch.profiler`; yields the profiler.

        Args:
            profile_handler: its options; default: those in `kwargs_handlers`. With `output_trace_dir` every rank
                writes a Chrome trace `profile_<rank>.json` there.
        """
        handler = profile_handler or self.profile_handler
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            os.makedirs(handler.output_trace_dir, exist_ok=True)
            profiler.export_chrome_trace(os.path.join(handler.output_trace_dir, f"profile_{self.process_index}.json"))
            self.wait_for_everyone()

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether a prepared optimizer gave up its last real step because of an overflow."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Refused: LOMO updates each weight in the backward pass, before gradients of other ranks have come."""
        raise UnsupportedError("lomo_backward: LOMO does not go with ZeRO; call backward(loss) and optimizer.step()")

    @contextmanager
    def maybe_context_parallel(
        self,
        buffers: list[torch.Tensor] | None = None,
        buffer_seq_dims: list[int] | None = None,
        no_restore_buffers: set[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Does nothing: context parallelism is never on here."""
        yield

    # --- across the ranks ---------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Tensors of all ranks, concatenated in the first dimension; nested structures too."""
        return operations.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather` without the samples that were repeated to fill the loader's last batch."""
        return operations.gather_for_metrics(input_data, self.gradient_state, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum, mean or max over the ranks, element by element; `scale` is accepted and has no effect, as off TPUs."""
        return operations.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pads tensors to the longest of all ranks in dimension `dim`."""
        return operations.pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def set_trigger(self) -> None:
        """Raises a flag on this rank, which `check_trigger` sees on all."""
        self.flag_tensor = torch.tensor(1, device=self.device)

    def check_trigger(self) -> bool:
        """Whether any rank raised its flag; lowers it. Every rank must ask."""
        if self.flag_tensor is None:
            self.flag_tensor = torch.tensor(0, device=self.device)
        raised = bool(self.reduce(self.flag_tensor).item() >= 1)
        if raised:
            self.flag_tensor = torch.tensor(0, device=self.device)
        return raised

    # --- models afterwards --------------------------------------------------------------------------------------

    def unwrap_model(
        self, model: torch.nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> Any:
        """The user's own module inside what `prepare()` returned."""
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def gathered_parameters(self, model_or_params: Any, modify: bool = False) -> AbstractContextManager[None]:
        """Inside the block the parameters are whole on every rank, on every stage. Collective, also at its end.

        Args:
            model_or_params: a model, prepared or not, a parameter, or several of them.
            modify: keep what rank 0 changes, on all ranks: the fp32 masters of a prepared model follow, so that the
                next step goes on from it; optimizer states stay as they are. Other ranks' changes are overwritten.

        Raises:
            UsageError: at the end of the block, on the rank that changed parameters without `modify`, or in a way that
                cannot be kept.
            DistributedError: on the other ranks then, and where the ranks do not gather the same.
        """
        return gathering.gathered(model_or_params, modify, self._shares)

    def _shares(self) -> list[Share]:
        return [self._backend.share(model) for model in self._models]

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any] | None:
        """The model's weights by name. Every rank must call it at stage 3.

        Args:
            model: what `prepare()` returned.
            unwrap: names as in the user's own module; without DeepSpeed only, under it they always are.

        Returns:
            Under DeepSpeed a copy on rank 0's CPU; on the others None at stage 3, below it the live tensors, as without
            DeepSpeed.

        Raises:
            ConfigError: stage 3 without `stage3_gather_16bit_weights_on_model_save`.
        """
        export.check_gathering_allowed(model)
        return self._whole_weights(model, unwrap)

    def _whole_weights(self, model: torch.nn.Module, unwrap: bool = True) -> dict[str, Any] | None:
        return export.get_state_dict(model, unwrap, copy=self.deepspeed_plugin is not None)

    def save_model(
        self,
        model: torch.nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes the model's weights tensor by tensor, at stage 3 too. Every rank must call it there.

        Args:
            model: wrapped or not.
            save_directory: folder; is made.
            max_shard_size: of a file, a number of bytes or a text such as "5GB".
            safe_serialization: safetensors with tied weights once; else `torch.save`.

        Raises:
            ConfigError: the folder is a file, or a weight cannot be saved.
            CheckpointError: the files cannot be written; older ones are still there.
        """
        everywhere = self.project_configuration.save_on_each_node
        export.save_model(model, save_directory, max_shard_size, safe_serialization, everywhere)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Writes an object on rank 0, or once a node with `ProjectConfiguration(save_on_each_node=True)`.

        Args:
            obj: anything that `torch.save` takes.
            f: path or open file.
            safe_serialization: write a dictionary of tensors as safetensors.

        Raises:
            ConfigError: at stage 3 a state dict with placeholders in place of weights.
        """
        export.refuse_placeholders(obj, self._models)
        files.save(obj, f, self.project_configuration.save_on_each_node, safe_serialization)

    # --- trackers -----------------------------------------------------------------------------------------------

    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Starts the trackers of `log_with`, on rank 0. Another call adds another run of each.

        Args:
            project_name: what each tool calls a project, an experiment or a run.
            config: hyperparameters to note.
            init_kwargs: further arguments by tracker: `{"wandb": {"tags": ["first"]}}`.
        """
        if not self.is_main_process:
            return
        if self._trackers_ended:
            self.trackers, self._trackers_ended = [], False
        wanted = [each for each in self.log_with if not any(each is tracker for tracker in self.trackers)]
        running.start(running.made(wanted, self.logging_dir, project_name, init_kwargs or {}), config, self.trackers)

    def log(
        self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Notes values in all trackers, from rank 0.

        Args:
            values: by name; numbers, texts, and what else a tracker takes.
            step: number of the step that they belong to.
            log_kwargs: further arguments by tracker.
        """
        for tracker in self.trackers if self.is_main_process else ():
            tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """One of the running trackers.

        Args:
            name: such as "wandb".
            unwrap: the tool's own run object instead.

        Returns:
            On ranks that do not track a `GeneralTracker`, whose methods do nothing; the tool's own are not there.

        Raises:
            ConfigError: none has this name.
        """
        return running.find(self.trackers, name, unwrap)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Has `save_state` and `load_state` keep these objects, too, in this order.

        Args:
            objects: anything with `state_dict` and `load_state_dict`.

        Raises:
            ConfigError: one of them lacks these.
        """
        check_registrable(objects)
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Has `save_state` call `hook(models, weights, output_dir)` first, on every rank.

        Both lists have one entry a prepared model; `weights[i]` is put together when it is read, which all ranks must
        do then. Whatever the hook takes out of them, the checkpoint is complete.
        """
        return self._checkpoints.before_save.register(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Has `load_state` call `hook(models, input_dir)` first, on every rank.

        A model that the hook takes out of the list keeps its weights; everything else is loaded.
        """
        return self._checkpoints.before_load.register(hook)

    def _contents(self) -> Contents:
        return Contents(self._shares(), self._schedulers, self._dataloaders, self._custom_objects, self.step)

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        **save_model_func_kwargs: Any,
    ) -> str:
        """Saves everything that `load_state` needs to go on as if nothing had happened. Every rank must call it.

        A checkpoint that is in the folder already stays loadable until the new one is complete on the disk, and so at
        whatever instant the run is killed.

        Args:
            output_dir: folder; with automatic naming it is `<project_dir>/checkpoints/checkpoint_<iteration>`.
            safe_serialization: accepted; tensors are always in safetensors files.
            save_model_func_kwargs: `exclude_frozen_parameters=True` leaves out what needs no gradient.

        Returns:
            The folder.

        Raises:
            CheckpointError: on every rank, if one could not write; the older checkpoint is as it was.
            UsageError: gradients were clipped, read or changed and not stepped on yet, or a registered object's state
                cannot be stored safely.
            ConfigError: no folder, or a numbered one that is taken.
        """
        return self._checkpoints.save(
            self._contents(), self._models, output_dir, save_model_func_kwargs, self._whole_weights
        )

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Brings the prepared objects to where `save_state` found them. Every rank must call it.

        The number of ranks, the ZeRO stage, offload and precision may be others than when it was saved. Folders of
        Accelerate's `save_state` and of DeepSpeed's `save_checkpoint` are loaded, too, where nothing of that changed.

        Args:
            input_dir: folder; None: the newest complete one of the numbered checkpoints.
            load_kwargs: of `torch.load`, for registered objects.
            load_model_func_kwargs: `load_module_only=True` loads weights and nothing else;
                `load_optimizer_states=False`, `load_lr_scheduler_states=False`; `load_module_strict=False` (or
                `strict=False`) ignores parameters that only the checkpoint or only the model has; `map_location` is
                accepted, everything is loaded to where it lies in this run.

        Raises:
            ConfigError: the folder does not exist.
            CheckpointError: on every rank; it is damaged or does not fit, with everything that does not.
        """
        options = load_model_func_kwargs
        held = self._models, self._optimizers
        step = self._checkpoints.load(self._contents(), *held, input_dir, load_kwargs, options)
        self.step = self.step if step is None else step

    def should_checkpoint(self) -> bool:
        """Whether it is time to save and leave: SIGTERM came to some rank. Every rank must ask.

        The first call has SIGTERM heard instead of ending the process. Ask where a step ends; inside of an
        accumulation window the answer is False. Costs one small exchange between the ranks.

            if accelerator.should_checkpoint():
                accelerator.save_state()
                accelerator.end_training()
                sys.exit(zeroaccel.checkpoint.PREEMPTED)  # 143: start me again
        """
        return self.sync_gradients and self._preemption.came()

    def newest_checkpoint(self) -> str | None:
        """Folder of the newest complete numbered checkpoint, which `load_state()` takes. Every rank must call it.

        Returns:
            None before the first one.

        Raises:
            ConfigError: checkpoints are not numbered.
        """
        return self._checkpoints.newest()

    def verify_device_map(self, model: torch.nn.Module) -> bool:
        """Whether the model is spread over several devices by a device map."""
        return any(len(getattr(module, "hf_device_map", None) or ()) > 1 for module in model.modules())

    def free_memory(self, *objects: Any) -> list[None]:
        """Lets go of everything that was prepared, so that its memory is free.

        Returns:
            One None an object: `model, optimizer = accelerator.free_memory(model, optimizer)`.
        """
        self._backend.release()
        self._reset_loop()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    clear = free_memory

    def end_training(self) -> None:
        """The last call of a script: ends trackers and the process group, all of them even if one of them fails."""
        self._trackers_ended = True
        with contextlib.ExitStack() as ending:
            ending.callback(PartialState().destroy_process_group)
            for tracker in reversed(self.trackers):
                ending.callback(tracker.finish)

    def __deepcopy__(self, memo: Any) -> Accelerator:
        return self
