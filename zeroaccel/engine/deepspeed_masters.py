"""Where each of DeepSpeed's optimizers keeps masters and optimizer state: `masters.py` for an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from zeroaccel.engine import open_windows
from zeroaccel.engine.masters import Group, Ownership, Shard, Share, Slice, add_plain_masters, names_of, whole_shards
from zeroaccel.engine.shards import is_split, refuse_expert_parallel
from zeroaccel.engine.stepping import Stepper
from zeroaccel.errors import UnsupportedError

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Of DeepSpeed's loss scalers, static ones included; of each what it has.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _SwappableShard(Shard):
    """A sub-group of stage 3, perhaps on NVMe."""

    def __init__(self, sharded: Any, number: int, slices: list[Slice], group: Group) -> None:
        super().__init__(sharded.fp32_partitioned_groups_flat[number], slices, group=group)
        self._sharded = sharded
        self._number = number

    @contextmanager
    def opened(
        self, write: bool = False, state: tuple[list[str], Mapping[str, Any]] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        if not self._swapped:
            with super().opened(write, state) as flat:
                yield flat
            return
        self._sharded._optimizer_states_and_gradient_swap_in(self._number)
        with super().opened(write, state) as flat:
            yield flat
        if write:
            self._sharded._optimizer_states_and_gradient_swap_out(self._number)
        else:
            self._sharded._release_swap_buffers(self._number)

    @property
    def _swapped(self) -> bool:
        return bool(self._sharded._swappable_optimizer_subgroup(self._number))

    def _written(self) -> None:
        self._sharded._reassign_or_swap_out_partitioned_parameters(self._number)

    def _forget_state(self, kept: dict[str, Any]) -> None:
        if not self._swapped:
            super()._forget_state(kept)
            return
        for name, value in kept.items():  # the swapper knows these tensors
            if isinstance(value, torch.Tensor):
                value.zero_()
            else:
                kept[name] = 0


class _NvmeShard(Shard):
    """A frozen parameter's part, which stage 3 keeps on NVMe."""

    def __init__(self, name: str, parameter: Any, slices: list[Slice]) -> None:
        super().__init__(parameter.ds_tensor, slices)
        self._parameter = parameter

    @contextmanager
    def opened(
        self, write: bool = False, state: tuple[list[str], Mapping[str, Any]] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        swapper = self._parameter.nvme_swapper
        swapper.swap_in([self._parameter], async_op=False)
        with super().opened(write, state) as flat:
            yield flat
        if write:
            swapper.swap_out_and_release([self._parameter])
        else:
            swapper.remove_partition_and_release_buffers([self._parameter])


class EngineShare(Share):
    """What this rank holds of an engine's model.

    Args:
        engine: the engine.
        stepper: what drives it; None where it has no optimizer.

    Raises:
        UnsupportedError: parameters that are cut along other lines than ZeRO's.
    """

    def __init__(self, engine: Any, stepper: Stepper | None) -> None:
        super().__init__(engine.module)
        self._engine = engine
        self._stepper = stepper
        self._optimizer = engine.optimizer
        _refuse_other_cuts(engine)
        if stepper is not None:
            self._find_masters()

    def _find_masters(self) -> None:
        sharded = self._optimizer
        if isinstance(sharded, DeepSpeedZeroOptimizer_Stage3):
            self._add_stage3(sharded)
        elif isinstance(sharded, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
            self._add_flat_partitions(sharded)
        elif isinstance(sharded, FP16_Optimizer):
            self._add_fused(sharded)
        elif isinstance(sharded, FP16_UnfusedOptimizer):
            self._add_unfused(sharded)
        else:
            add_plain_masters(self, [self._engine.basic_optimizer])

    def _add_stage3(self, sharded: Any) -> None:
        names = names_of(self.module)
        groups: dict[int, Group] = {}
        for number, parameters in enumerate(sharded.fp16_groups):
            source = sharded.sub_group_to_group_id[number]
            group = groups.get(source)
            if group is None:
                group = groups[source] = Group(sharded.optimizer, sharded.optimizer.param_groups[source], [])
            group.names += [names[id(parameter)] for parameter in parameters]
            slices = []
            for parameter in parameters:
                _, offset, part = sharded.grad_position[sharded.get_param_id(parameter)]
                start = part * sharded._get_param_partition_rank(parameter)
                count = max(0, min(part, parameter.ds_numel - start))
                slices.append(Slice(names[id(parameter)], start, count, offset))
            self.trained.append(_SwappableShard(sharded, number, slices, group))
        self.groups += [groups[source] for source in sorted(groups)]

    def _add_flat_partitions(self, sharded: Any) -> None:
        """Stages 1 and 2: each rank has one piece of all parameters of a group, one behind the other."""
        for number, options in enumerate(sharded.optimizer.param_groups):
            # Not DeepSpeed's own mapping, which is wrong with round_robin_gradients.
            if isinstance(sharded, BF16_Optimizer):
                parameters, offsets = sharded.bf16_groups[number], _ends_to_end(sharded.bf16_groups[number])
                master = sharded.fp32_groups_flat_partition[number]
            else:
                parameters = sharded.round_robin_bit16_groups[number]
                offsets = sharded.round_robin_bit16_offsets[number]
                master = sharded.single_partition_of_fp32_groups[number]
            begin = master.numel() * torch.distributed.get_rank(sharded.real_dp_process_group[number])
            self._add_flat(sharded.optimizer, options, parameters, offsets, master, begin)

    def _add_fused(self, sharded: Any) -> None:
        """Stage 0 in 16 bit: every rank has all masters of a group in one tensor."""
        for options, parameters, master in zip(
            sharded.optimizer.param_groups, sharded.fp16_groups, sharded.fp32_groups_flat, strict=True
        ):
            self._add_flat(sharded.optimizer, options, parameters, _ends_to_end(parameters), master, 0)
            self.trained[-1].ownership = Ownership.SHARED

    def _add_flat(
        self,
        optimizer: Any,
        options: dict[str, Any],
        parameters: list[Any],
        offsets: list[int],
        master: Any,
        begin: int,
    ) -> None:
        """`master` holds the group's elements from `begin` on."""
        names = names_of(self.module)
        group = Group(optimizer, options, [names[id(parameter)] for parameter in parameters])
        end, slices = begin + master.numel(), []
        for parameter, offset in zip(parameters, offsets, strict=True):
            first, last = max(begin, offset), min(end, offset + parameter.numel())
            if first < last:
                slices.append(Slice(names[id(parameter)], first - offset, last - first, first - begin))
        self.groups.append(group)
        self.trained.append(Shard(master, slices, group=group))

    def _add_unfused(self, sharded: Any) -> None:
        """Stage 0 in 16 bit: every rank has all masters, one tensor a parameter."""
        names = names_of(self.module)
        for options, parameters, masters in zip(
            sharded.optimizer.param_groups, sharded.fp16_groups, sharded.fp32_groups, strict=True
        ):
            group = Group(sharded.optimizer, options, [names[id(parameter)] for parameter in parameters])
            self.groups.append(group)
            self.trained += whole_shards(group, zip(group.names, masters, strict=True))

    def _untrained(self, name: str, parameter: Any) -> Shard:
        if not is_split(parameter):
            return super()._untrained(name, parameter)
        own = parameter.ds_tensor
        if hasattr(own, "ds_quant_scale"):
            raise UnsupportedError(
                f"{name}: zero_quantized_nontrainable_weights keeps it quantized in parts, which no checkpoint can hold"
            )
        part, rank = parameter.partition_numel(), torch.distributed.get_rank(parameter.ds_process_group)
        start = part * rank
        slices = [Slice(name, start, max(0, min(part, parameter.ds_numel - start)), 0)]
        if own.status is PartitionedParamStatus.NOT_AVAILABLE:
            return _NvmeShard(name, parameter, slices)
        return Shard(own, slices)

    # --- around reading and writing -----------------------------------------------------------------------------

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        get_accelerator().synchronize()  # DeepSpeed copies to and from host memory without waiting
        rests = hasattr(self._optimizer, "checkpoint_event_prologue")
        if rests:
            self._optimizer.checkpoint_event_prologue()  # stage 3: every rank has its part only
        elif hasattr(self._optimizer, "partition_all_parameters"):  # stage 3 without an optimizer
            self._optimizer.partition_all_parameters()
        try:
            yield
        finally:
            if rests:
                for parameter in self.module.parameters():
                    if getattr(parameter, "ds_secondary_tensor", None) is not None:
                        parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
                self._optimizer.checkpoint_event_epilogue()

    def refresh(self) -> None:
        sharded = self._optimizer
        if isinstance(sharded, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
            sharded.update_lp_params()
            self._link_state(sharded)
        elif isinstance(sharded, FP16_Optimizer):
            for parameters, master in zip(sharded.fp16_groups, sharded.fp32_groups_flat, strict=True):
                for parameter, offset in zip(parameters, _ends_to_end(parameters), strict=True):
                    parameter.data.copy_(master.detach().narrow(0, offset, parameter.numel()).view_as(parameter))
        elif isinstance(sharded, FP16_UnfusedOptimizer):
            for parameters, masters in zip(sharded.fp16_groups, sharded.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.data.copy_(master.detach())

    def _link_state(self, sharded: Any) -> None:
        """Has DeepSpeed's access functions find the optimizer state that is there now."""
        sharded._hp_optimizer_states_linked = False
        if all(shard.tensor in sharded.optimizer.state for shard in self.trained):
            sharded._lazy_init_hp_params_optimizer_state()

    # --- numbers ------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        found = {name: int(getattr(self._engine, name)) for name in _COUNTERS}
        scaler = self._scaler()
        if scaler is not None:
            found |= {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
        return found

    def _scaler(self) -> Any:
        """What holds fp16's loss scale, None in other precisions."""
        if self._stepper is None or not self._engine.fp16_enabled():
            return None
        return getattr(self._optimizer, "loss_scaler", None) or getattr(self._optimizer, "loss_scale_config", None)

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            if name in counters:
                setattr(self._engine, name, counters[name])
        scaler = self._scaler()
        if scaler is None or not self._engine.dynamic_loss_scale():  # a static scale is the configuration's
            return
        for name in _SCALER:
            if name in counters and hasattr(scaler, name):
                setattr(scaler, name, counters[name])

    def open_micro_batches(self) -> int:
        return 0 if self._stepper is None else self._stepper.window.micro_batches

    def gradient_layout(self) -> str:
        return "" if self._stepper is None else open_windows.layout(self._stepper)

    def open_window(self) -> dict[str, Any] | None:
        return open_windows.kept(self._stepper) if self._stepper and self.open_micro_batches() else None

    def set_open_window(self, window: Mapping[str, Any]) -> None:
        assert self._stepper is not None
        open_windows.restore(self._stepper, window)

    def drop_gradients(self) -> None:
        if self._stepper is None:
            return
        self._stepper.window.forget_blocks()
        if self._stepper.window.micro_batches:
            self._stepper._gradients.clear()
            self._stepper._end_window()


def _ends_to_end(parameters: list[Any]) -> list[int]:
    """Offsets of parameters that lie one behind the other."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += parameter.numel()
    return offsets


def _refuse_other_cuts(engine: Any) -> None:
    for name, parameter in engine.module.named_parameters():
        refuse_expert_parallel(name, parameter)
    if getattr(engine, "mpu", None) is not None or engine.pipeline_parallelism:
        raise UnsupportedError(
            "save_state and load_state hold models that ZeRO alone has cut, and this engine has tensor or pipeline"
            " parallelism as well: use engine.save_checkpoint() and engine.load_checkpoint()"
        )
