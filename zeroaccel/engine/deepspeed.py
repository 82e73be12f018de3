"""The DeepSpeed backend: facts, resolve, `deepspeed.initialize`, and back in the caller's order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from zeroaccel.config import auto, schema
from zeroaccel.config.facts import Facts, ResolvedConfig
from zeroaccel.engine import (
    compat,
    construction,
    facts,
    fetch_order,
    master_access,
    native_checkpoints,
    owners,
    stepping,
    zero_init,
)
from zeroaccel.engine.arguments import (
    Kind,
    distinct,
    drop_idle_groups,
    is_deepspeed_scheduler,
    mark_prepared,
    optimizer_of_each,
    parameters_of,
    refuse_device_map,
    replace,
)
from zeroaccel.engine.backend import Setup
from zeroaccel.engine.compilation import compile_regions_deepspeed
from zeroaccel.engine.deepspeed_masters import EngineShare
from zeroaccel.engine.inference import generate_in_step, take_no_gradients
from zeroaccel.engine.offload import for_offload, refuse_unshardable
from zeroaccel.engine.optimizer import DeepSpeedOptimizerWrapper, DummyOptim
from zeroaccel.engine.precision import guard_inputs
from zeroaccel.engine.quiet import quiet_deepspeed
from zeroaccel.engine.scheduler import AcceleratedScheduler, DeepSpeedSchedulerWrapper, DummyScheduler, redirect
from zeroaccel.engine.state_dicts import load_state_dict
from zeroaccel.engine.stepping import Stepper
from zeroaccel.engine.weights import LossWeights
from zeroaccel.engine.window import micro_batch
from zeroaccel.errors import ConfigError, UnsupportedError, UsageError
from zeroaccel.logging import library_logger
from zeroaccel.state import AcceleratorState, GradientState

logger = library_logger(__name__)


class DeepSpeedBackend:
    """Every model becomes a `DeepSpeedEngine`, every optimizer drives one."""

    scaler: Any = None

    def __init__(self, setup: Setup, state: AcceleratorState, gradient_state: GradientState) -> None:
        compat.use_device(state.device)
        compat.check_deepspeed()
        zero_init.mend()
        quiet_deepspeed()
        self._setup = setup
        self._state = state
        self._gradient_state = gradient_state
        self._weights = LossWeights(state.device)
        self._steppers: list[Stepper] = []
        self._optimizers: list[tuple[Any, DeepSpeedOptimizerWrapper]] = []  # the user's, what became of it
        self._resolved: ResolvedConfig | None = None
        self._micro_batch_size: int | None = None
        self._early_loaders: list[Any] = []  # prepared before the first model

    # --- prepare ------------------------------------------------------------------------------------------------

    def prepare(self, objects: tuple[Any, ...], device_placement: list[bool] | None) -> tuple[Any, ...]:
        """Resolves the config and builds an engine for each model.

        Raises:
            ConfigError: the objects or the config contradict each other.
        """
        if device_placement is not None:
            raise ConfigError(
                "device_placement cannot be chosen under DeepSpeed, which places models itself: leave it out"
            )
        models, loaders = distinct(objects, Kind.MODEL), distinct(objects, Kind.LOADER)
        optimizers, schedulers = distinct(objects, Kind.OPTIMIZER), distinct(objects, Kind.SCHEDULER)
        self._refuse_again([*models, *optimizers])
        refuse_device_map(models, distributed=True)
        scheduler_of = self._schedulers_by_optimizer(schedulers, optimizers)
        pairs = list(zip(models, optimizer_of_each(models, optimizers), strict=True))
        replacements: dict[int, Any] = {id(loader): self._setup.prepare_loader(loader) for loader in loaders}
        for model, optimizer in pairs:
            if next(model.parameters(), None) is None:  # a loss, say: nothing to train or to shard
                model.to(self._state.device)
                continue
            made = self._prepare_model(model, optimizer, scheduler_of.get(id(optimizer)), loaders)
            replacements.update(made)
        if not models and self._micro_batch_size is None:
            self._early_loaders += loaders
        for scheduler in schedulers:
            if id(scheduler) not in replacements:
                replacements[id(scheduler)] = self.prepare_scheduler(scheduler)
        return replace(objects, replacements)

    def _refuse_again(self, values: list[Any]) -> None:
        known = [
            *(stepper.engine.module for stepper in self._steppers),
            *(original for original, _ in self._optimizers),
        ]
        for value in values:
            if any(value is other for other in known):
                raise ConfigError(
                    f"this {type(value).__name__} was prepared before: go on with what that prepare() returned"
                )

    def _schedulers_by_optimizer(self, schedulers: list[Any], optimizers: list[Any]) -> dict[int, Any]:
        """The first scheduler of each optimizer in this call, by the optimizer's `id`; others' are checked."""
        found: dict[int, Any] = {}
        for scheduler in schedulers:
            own = getattr(scheduler, "optimizer", None)
            if any(own is optimizer for optimizer in optimizers):
                found.setdefault(id(own), scheduler)
            else:
                self._driven_by(scheduler)
        return found

    def _resolve(
        self, model: torch.nn.Module, optimizer: Any, scheduler: Any, loaders: list[Any]
    ) -> tuple[Any, dict[str, Any]]:
        plugin = self._state.deepspeed_plugin
        assert plugin is not None
        if not loaders and self._micro_batch_size is None:
            loaders = self._early_loaders
        known = Facts(
            world_size=self._state.num_processes,
            split_batches=self._setup.split_batches,
            accumulation_steps=self._gradient_state.num_steps,
            accumulation_typed=self._setup.accumulation_typed,
            loaders=facts.loader_facts(loaders),
            known_micro_batch_size=self._micro_batch_size,
            implicit_plugin=self._setup.implicit_plugin,
            model=facts.model_fact(model),
            optimizer=None if optimizer is None else facts.optimizer_fact(optimizer),
            scheduler=None if scheduler is None else facts.scheduler_fact(scheduler),
        )
        resolved = auto.resolve(plugin, known)
        if problems := schema.check(resolved.config):
            raise ConfigError.join(problems)
        for warning in resolved.warnings:
            logger.warning(warning)
        plugin.adopt(resolved)
        self._resolved = resolved
        if optimizer is not None or loaders:  # else the number is nobody's wish
            self._micro_batch_size = int(resolved.config["train_micro_batch_size_per_gpu"])
        self._gradient_state.plugin_kwargs["num_steps"] = int(resolved.config["gradient_accumulation_steps"])
        return plugin, copy.deepcopy(resolved.config)

    def _prepare_model(
        self, model: torch.nn.Module, optimizer: Any, scheduler: Any, loaders: list[Any]
    ) -> dict[int, Any]:
        plugin, config = self._resolve(model, optimizer, scheduler, loaders)
        stage = int(config["zero_optimization"].get("stage", 0))
        if optimizer is None and stage in (1, 2):
            raise ConfigError(
                f"ZeRO stage {stage} shards an optimizer, but prepare() got a {type(model).__name__} without one:"
                " pass the optimizer in the same call; or use zero_stage=3 (or 0) for inference, or"
                " accelerator.prepare_model(model, evaluation_mode=True)"
            )
        plugin.set_moe_leaf_modules(model)
        arguments: dict[str, Any] = {"model": model, "config": config}
        if optimizer is not None:
            drop_idle_groups(optimizer, scheduler, stage)
        if isinstance(optimizer, DummyOptim):
            arguments["model_parameters"] = optimizer.params
        elif optimizer is not None:
            refuse_unshardable(optimizer, stage)
            arguments["optimizer"] = for_offload(optimizer, config, plugin.intent())
        self._hand_over_scheduler(scheduler, arguments)
        # DeepSpeed replaces the groups' parameters by its flat partitions, so they are noted before.
        trained = {id(p) for p in parameters_of(optimizer) if p.requires_grad} if optimizer is not None else set()
        engine, sharded, _, engine_scheduler = construction.initialize(**arguments)
        made: dict[int, Any] = {id(model): self._finish_engine(engine)}
        if stage == 3 or optimizer is not None:
            self._gradient_state._add_engine(engine, always=stage == 3)
        if optimizer is not None:
            stepper = Stepper(engine, trained, self._gradient_state, self._weights)
            made.update(self._wrap(stepper, sharded, engine_scheduler, optimizer, scheduler))
            master_access.give_access(engine, self.share)
            self._log_summary(stepper)
        else:
            take_no_gradients(engine)
        return made

    def _hand_over_scheduler(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Schedulers that the engine steps itself."""
        if isinstance(scheduler, DummyScheduler):
            if scheduler.lr_scheduler_callable is not None:
                arguments["lr_scheduler"] = scheduler.lr_scheduler_callable
        elif is_deepspeed_scheduler(scheduler):
            scheduler.optimizer = arguments["optimizer"]  # the one that steps, under offload another than the user's
            arguments["lr_scheduler"] = scheduler

    def _finish_engine(self, engine: Any) -> Any:
        plugin = self._state.deepspeed_plugin
        assert plugin is not None
        engine.load_state_dict = partial(self._load_state_dict, engine)  # DeepSpeed's leaves the masters as they are
        engine.save_checkpoint = partial(native_checkpoints.save, engine, self.share, engine.save_checkpoint)
        engine.load_checkpoint = partial(native_checkpoints.load, engine, self.share, engine.load_checkpoint)
        engine.no_sync = nullcontext  # a backward pass never communicates here; DeepSpeed's asserts at stages 2 and 3
        # DeepSpeed's own cast leaves keyword arguments out.
        guard_inputs(engine, engine.get_data_types()[0], cast=plugin.cast_inputs or engine.fp16_auto_cast())
        if engine.zero_optimization_stage() == 3:
            fetch_order.watch(engine)
            generate_in_step(engine.module)
        self._compile(engine)
        owners.remember(engine, self)
        return mark_prepared(engine)

    def _compile(self, engine: Any) -> None:
        dynamo = self._state.dynamo_plugin
        options = dynamo.compile_options()
        if options is None:
            return
        if dynamo.use_regional_compilation:
            compile_regions_deepspeed(engine.module, **options)
        else:
            engine.compile(backend=options.pop("backend"), compile_kwargs=options)

    def _wrap(
        self, stepper: Stepper, sharded: Any, engine_scheduler: Any, optimizer: Any, scheduler: Any
    ) -> dict[int, Any]:
        wrapper = mark_prepared(DeepSpeedOptimizerWrapper(sharded, stepper))
        self._steppers.append(stepper)
        self._optimizers.append((optimizer, wrapper))
        made = {id(optimizer): wrapper}
        if scheduler is not None and engine_scheduler is not None:
            made[id(scheduler)] = mark_prepared(DeepSpeedSchedulerWrapper(engine_scheduler, wrapper))
        return made

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Has a PyTorch scheduler drive the optimizer that really steps.

        Args:
            scheduler: made from the user's optimizer, or from what `prepare()` made of it.

        Raises:
            ConfigError: no prepared optimizer is the scheduler's, or only the engine could step it.
        """
        stepper, wrapper = self._driven_by(scheduler)
        redirect(scheduler, stepper.engine.basic_optimizer)
        with_optimizer, split = self._setup.step_scheduler_with_optimizer, self._setup.split_batches
        return mark_prepared(AcceleratedScheduler(scheduler, wrapper, with_optimizer, split))

    def _driven_by(self, scheduler: Any) -> tuple[Stepper, DeepSpeedOptimizerWrapper]:
        """The prepared optimizer that a PyTorch scheduler drives."""
        name = type(scheduler).__name__
        if not isinstance(scheduler, LRScheduler):
            raise ConfigError(
                f"{name} must be prepared together with its model and optimizer, in one prepare() call, because"
                " DeepSpeed's engine steps it"
            )
        for stepper, (original, wrapper) in zip(self._steppers, self._optimizers, strict=True):
            if scheduler.optimizer is original or scheduler.optimizer is wrapper:
                return stepper, wrapper
        raise ConfigError(
            f"{name} drives an optimizer that was not prepared: prepare model and optimizer first, or all three in one"
            " call"
        )

    def _log_summary(self, stepper: Stepper) -> None:
        engine, clipping = stepper.engine, stepper.configured_clipping
        optimizer = type(engine.basic_optimizer).__name__
        clips = f"clips at {clipping}" if clipping else "clips only where clip_grad_norm_ is called"
        logger.info(
            "ZeRO stage %d, %s, %s: micro-batch %d x accumulation %d x ranks %d = %d; %s",
            engine.zero_optimization_stage(),
            str(engine.get_data_types()[0]).removeprefix("torch."),
            optimizer,
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
            self._state.num_processes,
            engine.train_batch_size(),
            clips,
        )

    def share(self, model: Any) -> EngineShare:
        """What this rank holds of an engine's model, for checkpoints."""
        own = next((stepper for stepper in self._steppers if stepper.engine is model), None)
        return EngineShare(model, own)

    def _load_state_dict(self, engine: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """In place of the engine's own; `assign` cannot be: the weights lie in ZeRO's buffers."""
        return load_state_dict(self.share(engine), state_dict, strict)

    def explanation(self) -> ResolvedConfig | None:
        """What the newest `prepare()` resolved."""
        return self._resolved

    # --- the loop -----------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Accumulates gradients in every engine that took part in the loss.

        Raises:
            UsageError: nothing was prepared with an optimizer.
            UnsupportedError: an option that DeepSpeed's backward does not have.
        """
        if not self._steppers:
            raise UsageError(
                "backward needs a model that was prepared with its optimizer: accelerator.prepare(model, optimizer)"
            )
        if options and (unknown := set(options) - {"retain_graph", "scale_wrt_gas", "weight"}):
            raise UnsupportedError(f"backward({', '.join(sorted(unknown))}=...) does not exist under DeepSpeed")
        if loss.numel() != 1:
            raise ConfigError(
                f"backward needs a scalar loss, got shape {tuple(loss.shape)}: reduce it, e.g. loss.mean()"
            )
        stepping.backward(self._steppers, loss, **options)

    def accumulation(self, models: Sequence[Any], at_end: bool) -> AbstractContextManager[None]:
        """One block of `accumulate(*models)`, which closes anyway where the loader ends."""
        named = []
        for stepper in self._steppers:
            stepper.window.size = stepper.steps
            if any(model is stepper.engine or model is stepper.engine.module for model in models):
                named.append(stepper.window)
        return micro_batch([stepper.window for stepper in self._steppers], named, at_end, self._gradient_state)

    def follow_accumulation(self) -> None:
        """Engines and the shown config go on with the number that the script assigned."""
        steps, plugin = self._gradient_state.num_steps, self._state.deepspeed_plugin
        for stepper in self._steppers:
            engine = stepper.engine
            engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * self._state.num_processes * steps)
        if self._resolved is None or self._micro_batch_size is None or plugin is None:
            return
        total = self._micro_batch_size * steps * self._state.num_processes
        values = {"gradient_accumulation_steps": steps, "train_batch_size": total}
        self._resolved = self._resolved.assigned(values, "accelerator.gradient_accumulation_steps was assigned")
        plugin.adopt(self._resolved)

    def _owners(self, parameters: Any, what: str) -> list[Stepper]:
        """Engines that own the parameters, each with all that it trains.

        Raises:
            ConfigError: parameters of no prepared model.
            UnsupportedError: only some of an engine's.
        """
        listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        given = {id(parameter) for parameter in listed}
        owners = [stepper for stepper in self._steppers if given & stepper.trained]
        if not owners:
            raise ConfigError(f"{what} got {len(listed)} parameters, none of a prepared model: pass model.parameters()")
        for stepper in owners:
            if missing := len(stepper.trained - given):
                raise UnsupportedError(
                    f"{what} got {len(stepper.trained) - missing} of the {len(stepper.trained)} parameters that the"
                    " optimizer trains: ZeRO clips them together, so pass model.parameters()"
                )
        return owners

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float) -> torch.Tensor:
        """Clips the coming step of the engines that own the parameters, by their common norm; 0 is off."""
        if float(norm_type) != 2.0:
            raise UnsupportedError(f"norm_type={norm_type}: DeepSpeed clips by the L2 norm only, use norm_type=2")
        owners = self._owners(parameters, "clip_grad_norm_")
        norms = [stepper.norm() for stepper in owners]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for stepper, norm in zip(owners, norms, strict=True):
            # Each share of the common norm, so that all are scaled by the same factor.
            share = 1.0 if len(owners) == 1 or not float(total) else float(norm / total)
            stepper.clip_norm(float(max_norm) * share)
        return norms[0] if len(owners) == 1 else total

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamps the gradients of the engines that own the parameters."""
        for stepper in self._owners(parameters, "clip_grad_value_"):
            stepper.clip_value(clip_value)

    def unscale_gradients(self, optimizers: list[Any]) -> None:
        """Nothing: DeepSpeed scales and unscales by itself."""

    def autocast(self, options: dict[str, Any] | None) -> AbstractContextManager[Any]:
        """Nothing: the model itself is in 16 bit."""
        return nullcontext()

    def release(self) -> None:
        """Frees the engines' memory."""
        for stepper in self._steppers:
            stepper.engine.destroy()
        self._steppers.clear()
        self._optimizers.clear()
        self._early_loaders.clear()
        self._micro_batch_size = None
