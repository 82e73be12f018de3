"""Who runs the loops of `situations.py`: this library, DeepSpeed's engine as its documentation drives it, Accelerate.

All have the vocabulary of an `Accelerator`, as far as they can.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.distributed.pool import reset_states

if TYPE_CHECKING:
    from tests.engine.loop import Kind

# What a contestant has no word for, so that a script cannot even ask.
LACKING: dict[str, set[str]] = {
    "zeroaccel": set(),
    "accelerate": {"weight", "refusal"},
    "deepspeed": {"weight", "refusal", "clip", "scheduler", "no_sync"},
}
BUCKET = 1_000_000  # elements: DeepSpeed's own 5e8 are 2 GB of a GPU, for each engine of each loop
NOT_CLIPPING = 1e9


class NotAvailable(Exception):
    """The contestant cannot say this, or the kind of run has no such thing."""


def make_optimizer(model: nn.Module, rule: str = "AdamW", kind: Kind | None = None) -> torch.optim.Optimizer:
    """The optimizer that a script hands over.

    AdamW's epsilon is as large as the gradients, so that a gradient of a wrong size changes the step.
    """
    parameters = model.parameters()
    if rule == "SGD":
        return torch.optim.SGD(parameters, lr=3e-2, momentum=0.9)
    options = {"lr": 1e-2, "eps": 0.1, "weight_decay": 0.1}
    if kind is not None and kind.library != "zeroaccel" and kind.offload != "none":
        # DeepSpeed asks for its own under offload.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, **options)


def make_accelerator(kind: Kind, steps: int, batch_size: int, config: dict[str, Any]) -> Any:
    """What carries the loop's vocabulary out.

    Args:
        kind: how to run.
        steps: gradient accumulation steps.
        batch_size: of a rank.
        config: further keys of the DeepSpeed config; None leaves a key to the contestant's default. Without
            `gradient_clipping` nothing clips, without `zero_force_ds_cpu_optimizer` Accelerate steps the script's
            optimizer, so that other situations are not wrong for these two reasons, which have one of their own.
    """
    reset_states()
    if kind.library == "deepspeed":
        return RawDeepSpeed(kind, steps, batch_size, config)
    library = importlib.import_module(kind.library)
    options: dict[str, Any] = {}
    if kind.library == "accelerate":
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as its launcher does
        if "gradient_clipping" not in config:
            options["gradient_clipping"] = NOT_CLIPPING  # it takes 0 for "not given"
        config = {"zero_force_ds_cpu_optimizer": False, **config}
    plugin = library.DeepSpeedPlugin(
        zero_stage=kind.stage,
        gradient_accumulation_steps=steps,
        offload_optimizer_device=kind.offload,
        offload_optimizer_nvme_path=kind.nvme_path if kind.offload == "nvme" else None,
        **options,
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    if kind.precision == "fp16":
        plugin.deepspeed_config["fp16"] = {"enabled": True, "auto_cast": False, "loss_scale": kind.loss_scale}
    plugin.deepspeed_config.update({key: value for key, value in config.items() if value is not None})
    return library.Accelerator(mixed_precision=kind.precision, deepspeed_plugin=plugin)


class RawDeepSpeed:
    """`deepspeed.initialize`, `engine.backward`, `engine.step`: nothing between the script and DeepSpeed."""

    def __init__(self, kind: Kind, steps: int, batch_size: int, config: dict[str, Any]) -> None:
        from zeroaccel.engine.compat import use_device
        from zeroaccel.state import PartialState

        state = PartialState()
        use_device(state.device)
        self.device, self.num_processes, self.process_index = state.device, state.num_processes, state.process_index
        self.gradient_accumulation_steps = steps
        self._engines: list[Any] = []
        offload = {"offload_optimizer": {"device": kind.offload}} if kind.offload != "none" else {}
        settings = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": kind.stage, "reduce_bucket_size": BUCKET, **offload},
            **config,
        }
        self._config = {key: value for key, value in settings.items() if value is not None}

    def prepare(self, *objects: Any) -> Any:
        if isinstance(objects[0], DataLoader):
            dataset, size = objects[0].dataset, objects[0].batch_size
            return DataLoader(dataset, batch_size=size, sampler=DistributedSampler(dataset, shuffle=False))
        import deepspeed

        model, optimizer = objects
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config)
        self._engines.append(engine)
        return engine, RawOptimizer(engine)

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        if len(self._engines) > 1:  # as DeepSpeed says where a loss runs through several engines
            loss.backward(**options)  # type: ignore[no-untyped-call]
        else:
            self._engines[0].backward(loss, **options)

    def accumulate(self, *models: Any) -> AbstractContextManager[None]:
        return nullcontext()  # the engine counts

    @property
    def sync_gradients(self) -> bool:
        return bool(self._engines[0].is_gradient_accumulation_boundary())

    @sync_gradients.setter
    def sync_gradients(self, boundary: bool) -> None:
        for engine in self._engines:
            engine.set_gradient_accumulation_boundary(boundary)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)


class RawOptimizer:
    """The step of an engine."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer
        self._engine = engine

    @property
    def step_was_skipped(self) -> bool:
        return not self._engine.was_step_applied()

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        self._engine.optimizer.zero_grad()
