"""Where DeepSpeed's optimizers keep a window's gradients, from the first backward pass to the step.

One class for each kind of optimizer, all with the same vocabulary. The protocol: `arm` before every backward pass,
so that it only accumulates, and `disarm` where it did not come to this engine; once a window `reduce`, which averages
over the ranks; then the gradients can be read, clipped, changed; then the engine's step, and `after_step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3, combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from zeroaccel.engine.reduction_order import ReductionOrder
from zeroaccel.errors import UnsupportedError

# of a module: passes that stage 3's hooks expect
_COUNTERS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")


class Gradients:
    """Stage 0: plain data parallelism, gradients in `parameter.grad`; base of the others.

    Attributes:
        local: gradients lie in `parameter.grad` of every rank, where the script sees and changes them, so they are
            averaged as soon as a step could follow. A further backward pass may join, since averaging is linear.
    """

    local = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self._reduced_in_backward = engine.zero_optimization_partition_gradients()

    @property
    def loss_scale(self) -> float:
        """Factor between the gradients kept here and the true ones (fp16), else 1."""
        return float(getattr(self.optimizer, "loss_scale", None) or 1.0)

    def arm(self) -> None:
        """Before every backward pass: it shall accumulate, not finish a window."""
        self.set_boundary(False)

    def disarm(self) -> None:
        """The pass did not reach this engine: everything is as before."""
        self.set_boundary(None)

    def let_go(self) -> None:
        """The script drives the engine by itself from now on: DeepSpeed's own ways are back."""

    def set_boundary(self, boundary: bool | None) -> None:
        """What the engine takes for the end of a window, None: it counts by itself. Before it nothing is reduced."""
        attributes = self.engine.__dict__  # past Module.__setattr__, which takes as long as all of the counting
        attributes["_is_gradient_accumulation_boundary"] = boundary
        attributes["enable_backward_allreduce"] = self._reduced_in_backward or boundary is not False

    @contextmanager
    def keeping_graph(self) -> Iterator[None]:
        """Around a backward pass after which its graph is backwarded again."""
        yield

    def reduce(self) -> None:
        """Averages the window's gradients over the ranks; collective, once a window."""
        self.set_boundary(True)
        self.engine.allreduce_gradients()

    def accumulated(self) -> Iterator[torch.Tensor]:
        """Tensors that hold this rank's accumulated gradients before `reduce`."""
        for parameter in self.engine.module.parameters():
            if parameter.grad is not None:
                yield parameter.grad

    def reduced(self) -> Iterator[torch.Tensor]:
        """Tensors that hold the gradients after `reduce`, times the loss scale."""
        return Gradients.accumulated(self)

    def refresh_norms(self) -> None:
        """After a change of the reduced gradients: brings DeepSpeed's stored norms in line."""

    def scaled_norm(self) -> torch.Tensor:
        """L2 norm of the reduced gradients times the loss scale; collective. Not finite on overflow."""
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in self.reduced()]
        if not norms:
            return torch.zeros((), device=self.engine.device)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def hold_norm(self, scaled: torch.Tensor) -> None:
        """Spares the step a second computation of the norm; `release_norm` and `after_step` let go of it."""

    def release_norm(self) -> None:
        """The held norm is true no more."""

    def set_clipping(self, max_norm: float) -> None:
        """Sets what the next step clips to; 0 is off."""
        if hasattr(self.optimizer, "clip_grad"):
            self.optimizer.clip_grad = max_norm
        self.engine._config.gradient_clipping = max_norm  # what stage 0 in fp32 reads

    def clear(self) -> None:
        """Throws away everything that was accumulated."""
        for parameter in self.engine.module.parameters():
            parameter.grad = None

    def after_step(self) -> None:
        """After the engine's step, and before the first window: DeepSpeed counts again until the next `arm`."""
        self.set_boundary(None)


class _ZeroGradients(Gradients):
    local = False
    _order: ReductionOrder | None = None  # where ranks reduce during the backward pass

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._offloaded = bool(engine.zero_use_cpu_optimizer())

    def _keep_order(self) -> None:
        if self.engine.world_size > 1:
            self._order = ReductionOrder(self.optimizer, self.engine.module)

    def arm(self) -> None:
        self.set_boundary(False)
        self.optimizer.clear_backward_seen_flag()
        self.optimizer._backward_active_depth = 0

    def set_boundary(self, boundary: bool | None) -> None:
        super().set_boundary(boundary)
        self.optimizer._is_gradient_accumulation_boundary = bool(boundary)  # its own copy

    def _land(self) -> None:
        """Gradients in host memory are there: DeepSpeed copies them from the device without waiting."""
        if self._offloaded:
            get_accelerator().synchronize()

    def clear(self) -> None:
        self._land()
        super().clear()  # first: stage 3 cannot drop a gradient that a failed backward pass left on the CPU
        if self._order is not None:
            self._order.forget()
        self.optimizer.zero_grad(set_to_none=True)
        for bucket in self.optimizer.ipg_buckets.values():  # what such a pass left unreduced
            getattr(bucket, "clear_params", bucket.clear)()  # stage 3 keeps its buffer
        reduced = self.optimizer.params_already_reduced
        for key in reduced if isinstance(reduced, dict) else range(len(reduced)):
            reduced[key] = False

    def _invalid_as_infinite(self, norm: torch.Tensor) -> torch.Tensor:
        # DeepSpeed writes -1 for a norm that is not finite.
        return torch.full_like(norm, float("inf")) if float(norm) < 0 else norm


class Stage12Gradients(_ZeroGradients):
    """Stages 1 and 2, with and without optimizer offload."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._takes_in = False
        if self.optimizer.partition_gradients:
            self._keep_order()
            return
        # Else stage 1 leaves this rank's own gradient in `parameter.grad`, where it is taken for the average. Where it
        # accumulates in another precision, DeepSpeed takes each one away by itself.
        self._takes_in = not self.optimizer.use_grad_accum_attribute
        self._holds = False  # gradients of earlier passes lie in `parameter.grad_accum`
        if self._takes_in:
            self.optimizer.use_grad_accum_attribute = True
            self.optimizer.backward_epilogue = self._take_in
        # No backward pass runs when stage 1 reduces; with this set it leaves gradients out that came before.
        self.optimizer.overlap_comm = False

    def arm(self) -> None:
        super().arm()
        if not self._takes_in:
            return
        # Autograd adds in place: DeepSpeed's hooks, which see this attribute, would take each gradient by itself.
        self.optimizer.use_grad_accum_attribute = False
        if self._holds:
            for group in self.optimizer.bit16_groups:
                for parameter in group:
                    if (held := parameter.grad_accum) is None:
                        continue  # a plain loss.backward() arms once for each forward pass that it runs through
                    if parameter.grad is not None:
                        held.add_(parameter.grad)
                    parameter.grad, parameter.grad_accum = held, None

    def disarm(self) -> None:
        super().disarm()
        if self._takes_in:
            self._take_in()

    def let_go(self) -> None:
        if self._takes_in:
            self.optimizer.use_grad_accum_attribute = False
            del self.optimizer.backward_epilogue

    def _take_in(self) -> None:
        # At the end of every backward pass.
        self.optimizer.use_grad_accum_attribute = self._holds = True
        for group in self.optimizer.bit16_groups:
            for parameter in group:
                if (gradient := parameter.grad) is None:
                    continue
                if (accumulated := parameter.grad_accum) is None:
                    parameter.grad_accum = gradient
                else:
                    accumulated.add_(gradient)
                parameter.grad = None

    def reduce(self) -> None:
        if not self.optimizer.partition_gradients:
            self._fill_missing()
            super().reduce()
            self._land()
            return
        self.set_boundary(True)
        self.optimizer.finalize_gradient_accumulation_boundary()
        self._land()

    def _fill_missing(self) -> None:
        # DeepSpeed leaves out what this rank did not use, and so adds up gradients of different parameters.
        for group in self.optimizer.bit16_groups:
            for parameter in group:
                if parameter.grad_accum is None and parameter.requires_grad:
                    parameter.grad_accum = torch.zeros_like(parameter, dtype=self.optimizer.gradient_accumulation_dtype)

    def accumulated(self) -> Iterator[torch.Tensor]:
        if not self.optimizer.partition_gradients:
            for group in self.optimizer.bit16_groups:
                for parameter in group:
                    gradient = self.optimizer.get_param_gradient_attribute(parameter)
                    if gradient is not None:
                        yield gradient
        elif self.optimizer.cpu_offload:
            self._land()
            yield from self.optimizer.accumulated_grads_in_cpu.values()
        else:
            for tensors in self.optimizer.all_grad_tensors.values():
                yield from tensors or ()
            # bf16 with fp32 accumulation keeps one flat partition instead
            for group in self.optimizer.averaged_gradients.values():
                flat = getattr(group, "flat_partition", None)
                if flat is not None:
                    yield flat

    def reduced(self) -> Iterator[torch.Tensor]:
        if self.optimizer.cpu_offload:
            for partition in self.optimizer.single_partition_of_fp32_groups:
                if partition.grad is not None:
                    yield partition.grad
            return
        for group in self.optimizer.averaged_gradients.values():
            flat = getattr(group, "flat_partition", None)
            if flat is not None:
                yield flat
            else:
                yield from group or ()

    def refresh_norms(self) -> None:
        if not self.optimizer.cpu_offload:
            return
        norms = self.optimizer.norm_for_param_grads
        for group, parameters in enumerate(self.optimizer.params_in_partition):
            gradient = self.optimizer.single_partition_of_fp32_groups[group].grad.view(-1)
            for parameter in parameters:
                key = self.optimizer.get_param_id(parameter)
                if key in norms:
                    _, _, offset, count = self.optimizer.grad_position[key]
                    norms[key] = gradient.narrow(0, offset, count).double().norm(2)

    def scaled_norm(self) -> torch.Tensor:
        return self._invalid_as_infinite(self.optimizer.scaled_global_norm())

    def hold_norm(self, scaled: torch.Tensor) -> None:
        self.optimizer.scaled_global_norm = lambda norm_type=2: scaled

    def clear(self) -> None:
        super().clear()
        optimizer = self.optimizer
        for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in groups:
                groups[group] = None
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
            self._zero_offloaded()

    def release_norm(self) -> None:
        self.optimizer.__dict__.pop("scaled_global_norm", None)

    def after_step(self) -> None:
        super().after_step()
        self.release_norm()
        self._holds = False
        if self.optimizer.cpu_offload:
            self._zero_offloaded()

    def _zero_offloaded(self) -> None:
        # DeepSpeed 0.19.8 keeps last step's gradient of a parameter that the next window does not touch.
        for gradient in self.optimizer.accumulated_grads_in_cpu.values():
            gradient.zero_()
        for partition in self.optimizer.single_partition_of_fp32_groups:
            if partition.grad is not None:
                partition.grad.zero_()


class Bf16Gradients(_ZeroGradients):
    """Stage 1 in bf16 with fp32 accumulation (`data_types.grad_accum_dtype`)."""

    def accumulated(self) -> Iterator[torch.Tensor]:
        yield from self.optimizer.fp32_groups_gradients_flat

    def reduced(self) -> Iterator[torch.Tensor]:
        return self.accumulated()

    def scaled_norm(self) -> torch.Tensor:
        norm = get_global_norm_of_tensors(
            input_tensors=self.optimizer.get_grads_for_norm()[0],
            mpu=self.optimizer.mpu,
            norm_type=self.optimizer.norm_type,
        )
        return self._invalid_as_infinite(norm)

    def clear(self) -> None:
        Gradients.clear(self)
        self.optimizer.zero_grad(set_to_none=True)


class Stage3Gradients(_ZeroGradients):
    """Stage 3, with and without offload to CPU memory or NVMe."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._counted: list[Any] = []
        parameters = [parameter for group in self.optimizer.fp16_groups for parameter in group]
        ends = list(accumulate(parameter.partition_numel() for parameter in parameters))
        # Where each one's gradient begins and ends in the flat buffer.
        self._places = {each.ds_id: place for each, place in zip(parameters, pairwise([0, *ends]), strict=True)}
        self._filled: set[int] = set()  # whose gradients there are of this window; the others are old
        self._partition = self.optimizer.partition_grads
        self.optimizer.partition_grads = self._copy_or_add
        self._keep_order()

    def let_go(self) -> None:
        self.optimizer.partition_grads = self._partition
        self.optimizer.micro_step_id = 0

    def _copy_or_add(self, parameters: list[Any], gradients: list[torch.Tensor]) -> Any:
        """The first gradient of a window is copied into a parameter's buffer, the others are added.

        DeepSpeed copies in the first pass and adds in later ones: wrong once two losses touch different parameters.
        """
        numbers = {parameter.ds_id for parameter in parameters}
        copies = self._filled.isdisjoint(numbers)
        if not copies:
            self._zero(numbers - self._filled)
        self._filled |= numbers
        self.optimizer.micro_step_id = 0 if copies else 1
        return self._partition(parameters, gradients)

    def _zero(self, numbers: set[int]) -> None:
        for begin, end in (self._places[number] for number in numbers):
            self.optimizer.grad_partitions_flat_buffer[begin:end].zero_()

    def _fill_missing(self) -> None:
        missing = self._places.keys() - self._filled
        if missing:
            self._zero(missing)
            self._filled |= missing
            get_accelerator().synchronize()  # the step looks for overflows on another stream

    @contextmanager
    def keeping_graph(self) -> Iterator[None]:
        # DeepSpeed's hooks fetch weights for as many backward passes as there were forward passes.
        modules = [module for module in self.engine.module.modules() if _COUNTERS[0] in module.__dict__]
        counts = [{name: module.__dict__[name] for name in _COUNTERS} for module in modules]
        self._counted += modules
        yield
        for module, count in zip(modules, counts, strict=True):
            module.__dict__.update(count)

    def reduce(self) -> None:
        self.set_boundary(True)
        self._fill_missing()
        if self.optimizer.offload_optimizer:
            self.optimizer._offload_boundary_param_ids = set(self._places)  # those that no pass touched, too, as zeros
        self.optimizer.finalize_gradient_accumulation_boundary()
        self._land()

    def accumulated(self) -> Iterator[torch.Tensor]:
        self._land()
        self._fill_missing()
        yield self.optimizer.grad_partitions_flat_buffer

    def reduced(self) -> Iterator[torch.Tensor]:
        if not self.optimizer.offload_optimizer:
            yield self.optimizer.grad_partitions_flat_buffer
            return
        for group, partition in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            if self.optimizer._swappable_optimizer_subgroup(group):
                raise UnsupportedError(
                    "the gradients of this model are on NVMe and cannot be changed before the step:"
                    " use offload_optimizer_device='cpu', or clip by norm (clip_grad_norm_)"
                )
            if partition.grad is not None:
                yield partition.grad

    def refresh_norms(self) -> None:
        if not self.optimizer.offload_optimizer:
            return
        norms = self.optimizer.norm_for_param_grads
        for parameters in self.optimizer.fp16_groups:
            for parameter in parameters:
                key = self.optimizer.get_param_id(parameter)
                if key in norms:
                    group, offset, count = self.optimizer.grad_position[key]
                    gradient = self.optimizer.fp32_partitioned_groups_flat[group].grad
                    if gradient is None:  # on NVMe: fragments.py keeps its norm
                        continue
                    norms[key] = gradient.narrow(0, offset, count).double().norm(2)

    def scaled_norm(self) -> torch.Tensor:
        self._norm_groups = self.optimizer._get_norm_groups()
        return self._invalid_as_infinite(combine_grad_norm_groups(self._norm_groups))

    def hold_norm(self, scaled: torch.Tensor) -> None:
        groups = self._norm_groups
        self.optimizer._get_norm_groups = lambda: groups

    def clear(self) -> None:
        super().clear()
        self.optimizer._offload_boundary_param_ids = set()
        self.optimizer.inf_or_nan_tracker.zero_()
        if self.optimizer.offload_optimizer:
            self.optimizer.norm_for_param_grads = {}

    def release_norm(self) -> None:
        self.optimizer.__dict__.pop("_get_norm_groups", None)

    def after_step(self) -> None:
        super().after_step()
        while self._counted:  # no graph outlives the step
            self._counted.pop().applied_pre_backward_ref_cnt = 0
        self.release_norm()
        self._filled.clear()


def gradients_of(engine: Any) -> Gradients:
    """The right view for the optimizer that DeepSpeed chose."""
    kinds: list[tuple[type, type[Gradients]]] = [
        (DeepSpeedZeroOptimizer_Stage3, Stage3Gradients),
        (DeepSpeedZeroOptimizer, Stage12Gradients),
        (BF16_Optimizer, Bf16Gradients),
    ]
    for optimizer_class, view in kinds:
        if isinstance(engine.optimizer, optimizer_class):
            return view(engine)
    return Gradients(engine)
