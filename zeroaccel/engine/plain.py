"""The plain PyTorch backend: one process, no DeepSpeed, the same vocabulary and the same windows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from zeroaccel.config.facts import ResolvedConfig
from zeroaccel.distributed.operations import convert_outputs_to_fp32
from zeroaccel.engine.arguments import (
    Kind,
    distinct,
    kind_of,
    mark_prepared,
    parameters_of,
    refuse_device_map,
    replace,
)
from zeroaccel.engine.backend import Setup
from zeroaccel.engine.compilation import compile_regions, has_repeated_blocks
from zeroaccel.engine.masters import PlainShare
from zeroaccel.engine.optimizer import AcceleratedOptimizer, DummyOptim
from zeroaccel.engine.plain_stepping import PlainStepper, check_at_epoch_end
from zeroaccel.engine.scheduler import AcceleratedScheduler, DummyScheduler
from zeroaccel.engine.unwrap import extract_model_from_parallel
from zeroaccel.engine.weights import LossWeights
from zeroaccel.engine.window import micro_batch
from zeroaccel.errors import ConfigError
from zeroaccel.state import AcceleratorState, GradientState

_AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PlainBackend:
    """One process on one device; mixed precision by `torch.autocast`."""

    def __init__(self, setup: Setup, state: AcceleratorState, gradient_state: GradientState) -> None:
        self._setup = setup
        self._state = state
        self._gradient_state = gradient_state
        self._weights = LossWeights(state.device)
        self._steppers: list[PlainStepper] = []
        self._wrappers: list[AcceleratedOptimizer] = []
        self._last_norm = torch.zeros((), device=state.device)
        self.scaler: Any = None
        if state.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(state.device.type, **(setup.scaler_options or {}))

    def prepare(self, objects: tuple[Any, ...], device_placement: list[bool] | None) -> tuple[Any, ...]:
        """Places and wraps; models keep their class."""
        places: Sequence[bool | None] = device_placement if device_placement is not None else [None] * len(objects)
        replacements: dict[int, Any] = {}
        for value, place in zip(objects, places, strict=True):
            kind = kind_of(value)
            if kind is Kind.MODEL:
                replacements[id(value)] = self._prepare_model(value, place)
            elif kind is Kind.LOADER:
                replacements[id(value)] = self._setup.prepare_loader(value)
            elif kind is Kind.OPTIMIZER:
                replacements[id(value)] = self._prepare_optimizer(value, place)
        for scheduler in distinct(objects, Kind.SCHEDULER):
            replacements[id(scheduler)] = self.prepare_scheduler(scheduler)
        return replace(objects, replacements)

    def _placed(self, place: bool | None) -> bool:
        return self._setup.device_placement if place is None else place

    def _prepare_model(self, model: torch.nn.Module, place: bool | None) -> torch.nn.Module:
        refuse_device_map([model], distributed=False)
        if self._placed(place) and not getattr(model, "hf_device_map", None):
            model.to(self._state.device)
        dynamo = self._state.dynamo_plugin
        options = dynamo.compile_options()
        regional = options is not None and dynamo.use_regional_compilation and has_repeated_blocks(model)
        mark_prepared(model)
        prepared: Any = compile_regions(model, **options) if regional else model
        if self._state.mixed_precision in _AUTOCAST_DTYPES:
            for each in [model, prepared] if regional else [model]:
                each._original_forward = each.forward
                each.forward = convert_outputs_to_fp32(self._autocasting(each.forward))
        if options is not None and not regional:
            prepared = torch.compile(model, **options)
        return prepared  # type: ignore[no-any-return]

    def _autocasting(self, forward: Any) -> Any:
        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with self.autocast(self._setup.autocast_options):
                return forward(*args, **kwargs)

        return autocast_forward

    def _prepare_optimizer(self, optimizer: Any, place: bool | None) -> AcceleratedOptimizer:
        if isinstance(optimizer, DummyOptim):
            raise ConfigError(
                "DummyOptim stands for the optimizer of a DeepSpeed config, and this run has no DeepSpeed: pass"
                " `Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=...))`, or use a torch.optim optimizer"
            )
        stepper = PlainStepper(optimizer, self._gradient_state, self.scaler, self._weights)
        check_at_epoch_end(stepper, self._gradient_state)
        wrapper = AcceleratedOptimizer(optimizer, self._placed(place), self.scaler, stepper)
        self._steppers.append(stepper)
        self._wrappers.append(mark_prepared(wrapper))
        return wrapper

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Ties the scheduler to its optimizer, or to all of them where it has none."""
        if isinstance(scheduler, DummyScheduler):
            raise ConfigError(
                "DummyScheduler stands for the scheduler of a DeepSpeed config, and this run has no DeepSpeed:"
                " use a torch.optim.lr_scheduler instead"
            )
        own = [o for o in self._wrappers if o.optimizer is getattr(scheduler, "optimizer", None)]
        wrapper = AcceleratedScheduler(
            scheduler, own or self._wrappers, self._setup.step_scheduler_with_optimizer, self._setup.split_batches
        )
        return mark_prepared(wrapper)

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """`loss.backward` of the loss divided by the accumulation steps; `options` go to `torch.Tensor.backward`."""
        scaled, weight = options.pop("scale_wrt_gas", True), options.pop("weight", None)
        for stepper in self._steppers:
            stepper.window.check_weight(weight is not None)
            stepper.begin_backward()
        relative = None if weight is None else self._weights.relative(weight)
        if relative is not None:
            loss = loss * relative
        elif scaled:
            loss = loss / self._gradient_state.num_steps
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward(**options)  # type: ignore[no-untyped-call]
        for stepper in self._steppers:
            stepper.count_backward(scaled, relative)

    def accumulation(self, models: Sequence[Any], at_end: bool) -> AbstractContextManager[None]:
        """One block of `accumulate(*models)`, which closes anyway where the loader ends."""
        modules = [model for model in models if isinstance(model, torch.nn.Module)]
        trained = {id(parameter) for model in modules for parameter in model.parameters()}
        windows, named = [], []
        for stepper in self._steppers:
            stepper.window.size = self._gradient_state.num_steps
            windows.append(stepper.window)
            if any(id(parameter) in trained for parameter in parameters_of(stepper.optimizer)):
                named.append(stepper.window)
        return micro_batch(windows, named, at_end, self._gradient_state)

    def follow_accumulation(self) -> None:
        """Nothing: the windows ask for it."""

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float) -> torch.Tensor:
        """PyTorch's, on gradients that are final; inside an open window nothing, and the last norm again."""
        listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        final = [stepper.prepare_to_change() for stepper in self._steppers]
        if all(final):
            norm = torch.nn.utils.clip_grad_norm_(listed, max_norm or float("inf"), norm_type=norm_type)
            self._last_norm = norm
        return self._last_norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """PyTorch's, on gradients that are final; nothing inside an open window."""
        final = [stepper.prepare_to_change() for stepper in self._steppers]
        if all(final):
            torch.nn.utils.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizers: list[Any]) -> None:
        """Divides by the scaler's factor, once a step."""
        chosen = {id(optimizer) for optimizer in optimizers}
        for wrapper, stepper in zip(self._wrappers, self._steppers, strict=True):
            if not chosen or id(wrapper) in chosen:
                stepper.unscale()

    def autocast(self, options: dict[str, Any] | None) -> AbstractContextManager[Any]:
        """`torch.autocast` in the run's precision; nothing in fp32."""
        dtype = _AUTOCAST_DTYPES.get(self._state.mixed_precision)
        if dtype is None:
            return nullcontext()
        return torch.autocast(self._state.device.type, dtype=dtype, **(options or {}))

    def share(self, model: Any) -> PlainShare:
        """What there is of a prepared model, for checkpoints."""
        module = extract_model_from_parallel(model, keep_torch_compile=False)
        return PlainShare(module, self._steppers, self.scaler)

    def explanation(self) -> ResolvedConfig | None:
        """None: nothing was resolved."""
        return None

    def release(self) -> None:
        """Lets go of the optimizers."""
        self._steppers.clear()
        self._wrappers.clear()
