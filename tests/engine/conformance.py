"""The loop's vocabulary as checks that every backend must pass: plain PyTorch, and DeepSpeed at each stage.

All ranks see the same batches, so that what a check expects is what plain PyTorch arrives at in one process.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.pool import reset_states
from tests.parity.problem import full_weights

SAMPLES, FEATURES, BATCH = 12, 6, 2
Reference = Callable[[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]], None]


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_batches(count: int = SAMPLES // BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count * BATCH, FEATURES, generator=torch.Generator().manual_seed(5))
    return list(zip(x.split(BATCH), x.sum(1, keepdim=True).sin().split(BATCH), strict=True))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


@dataclass
class Run:
    """One prepared loop.

    Attributes:
        accelerator, model, optimizer: prepared; the learning rate is 0.1.
        batches: the same on every rank, on the device.
    """

    steps: int = 1
    stage: int | None = None
    offload: str = "none"
    scheduled: bool = False
    looped: bool = False
    batches: list[Any] = field(default_factory=make_batches)

    def __post_init__(self) -> None:
        from zeroaccel import Accelerator, DeepSpeedPlugin

        reset_states()
        plugin = None
        if self.stage is not None:
            plugin = DeepSpeedPlugin(zero_stage=self.stage, offload_optimizer_device=self.offload)
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.steps, deepspeed_plugin=plugin)
        self.user_model = make_model()
        user_optimizer = make_optimizer(self.user_model)
        self.model, self.optimizer = self.accelerator.prepare(self.user_model, user_optimizer)
        if self.scheduled:
            decay = torch.optim.lr_scheduler.LambdaLR(user_optimizer, lambda step: 1 / (1 + step))
            self.scheduler = self.accelerator.prepare(decay)

    def loader(self, batches: int) -> Any:
        """A prepared loader from which every rank gets `batches[:batches]`."""
        x = torch.cat([x for x, _ in self.batches[:batches] for _ in range(self.accelerator.num_processes)])
        y = torch.cat([y for _, y in self.batches[:batches] for _ in range(self.accelerator.num_processes)])
        return self.accelerator.prepare(DataLoader(TensorDataset(x, y), batch_size=BATCH))

    def backward(self, *numbers: int, **options: Any) -> None:
        """Backward passes of single batches."""
        for number in numbers:
            self.accelerator.backward(loss_of(self.model, self.batches[number]), **options)

    def weights(self) -> dict[str, torch.Tensor]:
        return full_weights(self.model)

    def expect(self, reference: Reference, tolerance: float = 1e-6) -> None:
        """The weights are those of plain PyTorch after `reference(model, optimizer, batches)`."""
        model = make_model()
        reference(model, make_optimizer(model), self.batches)
        for name, weight in self.weights().items():
            distance = float((weight - dict(model.named_parameters())[name].detach()).abs().max())
            assert distance <= tolerance, f"{name} differs by {distance:.1e}"


def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
    """A reference: nothing happened."""


def one_step(*numbers: int, scale: float = 1.0, clip: float = float("inf")) -> Reference:
    """A reference: one step on the sum of these batches' losses times `scale`."""

    def reference(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        sum((loss_of(model, batches[number]) for number in numbers), torch.zeros(())).mul(scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return reference


def several(*references: Reference) -> Reference:
    """References one after the other."""

    def reference(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        for one in references:
            one(model, optimizer, batches)

    return reference


# --- backward and step ------------------------------------------------------------------------------------------


def backward_only_accumulates(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0)
    run.expect(unchanged)
    run.optimizer.step()
    run.expect(one_step(0))


def two_losses_of_a_micro_batch_equal_their_sum(make: Callable[..., Run]) -> None:
    run = make()
    for numbers in ((0, 1), (2, 3)):
        run.backward(*numbers)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.expect(several(one_step(0, 1), one_step(2, 3)))


def step_without_backward_does_nothing(make: Callable[..., Run]) -> None:
    run = make()
    run.optimizer.step()
    run.expect(unchanged)
    run.backward(0)
    run.optimizer.step()
    run.optimizer.step()
    run.expect(one_step(0))


def zero_grad_throws_the_gradients_away(make: Callable[..., Run]) -> None:
    for zero_grad in ("optimizer", "model"):
        run = make()
        run.backward(0)
        getattr(run, zero_grad).zero_grad()
        run.backward(1)
        run.optimizer.step()
        run.expect(one_step(1))


def a_loss_scaled_by_the_script_is_not_divided(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    for number, closes in ((0, False), (1, True)):
        run.accelerator.sync_gradients = closes
        run.backward(number, scale_wrt_gas=False)
        run.optimizer.step()
    run.expect(one_step(0, 1))


def a_short_window_leaves_a_loss_scaled_by_the_script_alone(make: Callable[..., Run]) -> None:
    run = make(steps=4)
    for batch in run.loader(3):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch) / 10, scale_wrt_gas=False)
            run.optimizer.step()
    run.expect(one_step(0, 1, 2, scale=0.1))


def the_learning_rate_can_be_assigned(make: Callable[..., Run]) -> None:
    run = make()
    run.optimizer.param_groups[0]["lr"] = 0.01

    def reference(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        optimizer.param_groups[0]["lr"] = 0.01
        one_step(0)(model, optimizer, batches)

    run.backward(0)
    run.optimizer.step()
    run.expect(reference)


# --- accumulation -----------------------------------------------------------------------------------------------


def accumulate_steps_each_nth_block_and_at_the_loaders_end(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    flags = []
    for batch in run.loader(5):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch))
            flags.append(run.accelerator.sync_gradients)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert flags == [False, True, False, True, True]
    run.expect(several(one_step(0, 1, scale=0.5), one_step(2, 3, scale=0.5), one_step(4)))


def the_library_counts_without_accumulate(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    flags = []
    for batch in run.loader(4):
        run.accelerator.backward(loss_of(run.model, batch))
        run.optimizer.step()
        flags.append(run.accelerator.sync_gradients)
        run.optimizer.zero_grad()
    assert flags[1::2] == [True, True], flags
    run.expect(several(one_step(0, 1, scale=0.5), one_step(2, 3, scale=0.5)))


def the_script_cuts_by_stepping_after_several_batches(make: Callable[..., Run]) -> None:
    run = make(steps=3)
    for number, batch in enumerate(run.loader(6), 1):
        run.accelerator.backward(loss_of(run.model, batch))
        if number % 3 == 0:
            run.optimizer.step()
            run.optimizer.zero_grad()
    run.expect(several(one_step(0, 1, 2, scale=1 / 3), one_step(3, 4, 5, scale=1 / 3)))


def a_loop_without_a_loader_counts_steps(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    for number in range(4):
        run.backward(number)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.expect(several(one_step(0, 1, scale=0.5), one_step(2, 3, scale=0.5)))


def zero_grad_in_an_open_window_keeps_the_gradients(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    for batch in run.loader(2):
        with run.accelerator.accumulate(run.model):
            run.optimizer.zero_grad()
            run.accelerator.backward(loss_of(run.model, batch))
            run.optimizer.step()
    run.expect(one_step(0, 1, scale=0.5))


def the_accumulation_steps_can_be_changed_between_windows(make: Callable[..., Run]) -> None:
    run = make(steps=1)
    run.backward(0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.accelerator.gradient_accumulation_steps = 2
    assert run.accelerator.gradient_accumulation_steps == 2
    for batch in run.loader(2):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch))
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.accelerator.sync_gradients
    run.expect(several(one_step(0), one_step(0, 1, scale=0.5)))


def sync_each_batch_gives_the_same_weights(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    run.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    for batch in run.loader(2):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch))
            run.optimizer.step()
    run.expect(one_step(0, 1, scale=0.5))


def a_plain_backward_counts_or_is_refused(make: Callable[..., Run]) -> None:
    run = make()
    loss = loss_of(run.model, run.batches[0])
    if run.stage == 0:
        with pytest.raises(RuntimeError, match=r"call accelerator\.backward\(loss\) instead"):
            loss.backward()
        return
    loss.backward()
    run.backward(1)  # what a step without it would have to know of
    run.optimizer.step()
    run.expect(one_step(0, 1))


def sync_with_dataloader_false_leaves_the_window_open(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    run.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    for _ in range(2):
        for batch in run.loader(3):
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(loss_of(run.model, batch))
                run.optimizer.step()
                run.optimizer.zero_grad()
    run.expect(several(*(one_step(a, b, scale=0.5) for a, b in ((0, 1), (2, 0), (1, 2)))))


def no_sync_and_its_like_are_harmless(make: Callable[..., Run]) -> None:
    run = make()
    with run.accelerator.no_sync(run.model), run.accelerator.autocast():
        run.backward(0)
    with run.accelerator.trigger_sync_in_backward(run.model):
        run.backward(1)
    with getattr(run.model, "no_sync", contextlib.nullcontext)():
        run.backward(2)
    run.optimizer.step()
    run.expect(one_step(0, 1, 2))


def a_loop_that_never_steps_is_told_so(make: Callable[..., Run]) -> None:
    run = make()
    batches = iter(run.loader(3))
    for _ in range(3):
        run.accelerator.backward(loss_of(run.model, next(batches)))
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was never called"):
        next(batches)


def step_refuses_a_closure(make: Callable[..., Run]) -> None:
    run = make()
    with pytest.raises(RuntimeError, match="closure"):
        run.optimizer.step(lambda: 0.0)


# --- clipping ---------------------------------------------------------------------------------------------------


def true_norm(*numbers: int, scale: float = 1.0) -> float:
    model = make_model()
    sum((loss_of(model, make_batches()[n]) for n in numbers), torch.zeros(())).mul(scale).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))


def clipping_takes_the_calls_number_and_returns_the_norm_before(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0, 1)
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), 0.1)
    assert float(norm) == pytest.approx(true_norm(0, 1), rel=1e-5)
    assert float(norm) > 0.1
    run.optimizer.step()
    run.expect(one_step(0, 1, clip=0.1))


def clipping_holds_for_one_step_only_and_zero_is_off(make: Callable[..., Run]) -> None:
    run = make()
    for max_norm in (0.1, None, 0):
        run.backward(0)
        if max_norm is not None:
            run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.expect(several(one_step(0, clip=0.1), one_step(0), one_step(0)))


def clipping_in_an_open_window_waits_for_its_end(make: Callable[..., Run]) -> None:
    run = make(steps=2)
    norms = []
    for batch in run.loader(2):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch))
            norms.append(float(run.accelerator.clip_grad_norm_(run.model.parameters(), 0.05)))
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert norms[0] == 0  # the last one's, and there was none
    assert norms[1] == pytest.approx(true_norm(0, 1, scale=0.5), rel=1e-5)
    run.expect(one_step(0, 1, scale=0.5, clip=0.05))


def a_backward_pass_behind_clipping_is_refused(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0)
    run.accelerator.clip_grad_norm_(run.model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="backward was called after the window's gradients were clipped"):
        run.backward(1)
    run.optimizer.step()
    run.expect(one_step(0, clip=0.1))


def values_can_be_clipped(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0)
    run.accelerator.clip_grad_value_(run.model.parameters(), 0.02)
    run.optimizer.step()

    def reference(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        loss_of(model, batches[0]).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.02)
        optimizer.step()

    run.expect(reference)


# --- schedulers -------------------------------------------------------------------------------------------------


def the_scheduler_steps_with_the_optimizer(make: Callable[..., Run]) -> None:
    run = make(steps=2, scheduled=True)
    rates = []
    for batch in run.loader(4):
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, batch))
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
            rates.append(run.optimizer.param_groups[0]["lr"])
    ranks = run.accelerator.num_processes
    expected = [0.1, 0.1 / (1 + ranks), 0.1 / (1 + ranks), 0.1 / (1 + 2 * ranks)]
    assert rates == pytest.approx(expected)
    assert run.scheduler.get_last_lr() == pytest.approx([expected[-1]])


# --- afterwards -------------------------------------------------------------------------------------------------


def what_prepare_returns_is_what_scripts_check_for(make: Callable[..., Run]) -> None:
    from zeroaccel.optimizer import AcceleratedOptimizer
    from zeroaccel.scheduler import AcceleratedScheduler

    run = make(scheduled=True)
    assert isinstance(run.optimizer, torch.optim.Optimizer)
    assert isinstance(run.optimizer, AcceleratedOptimizer)
    assert isinstance(run.scheduler, AcceleratedScheduler)
    assert run.accelerator.unwrap_model(run.model) is run.user_model
    assert run.accelerator._models == [run.model]
    assert run.accelerator._optimizers == [run.optimizer]
    assert run.accelerator._schedulers == [run.scheduler]
    assert run.optimizer.step_was_skipped is False
    assert run.accelerator.optimizer_step_was_skipped is False
    assert run.accelerator.prepare(run.model, run.optimizer) == (run.model, run.optimizer)


def free_memory_lets_go_and_a_new_prepare_works(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0)
    run.optimizer.step()
    accelerator = run.accelerator
    assert accelerator.free_memory(run.model, run.optimizer) == [None, None]
    assert accelerator._models == accelerator._optimizers == []
    model = make_model()
    run.model, run.optimizer = accelerator.prepare(model, make_optimizer(model))
    run.backward(1)
    run.optimizer.step()
    run.expect(one_step(1))


def a_flag_raised_on_one_rank_is_seen_on_all(make: Callable[..., Run]) -> None:
    accelerator = make().accelerator
    assert not accelerator.check_trigger()
    if accelerator.is_last_process:
        accelerator.set_trigger()
    assert accelerator.check_trigger()
    assert not accelerator.check_trigger()


def evaluation_in_between_changes_nothing(make: Callable[..., Run]) -> None:
    run = make()
    run.backward(0)
    run.model.eval()
    with torch.no_grad():
        loss_of(run.model, run.batches[3])
    run.model.train()
    run.backward(1)
    run.optimizer.step()
    run.expect(one_step(0, 1))


CHECKS: list[Callable[[Callable[..., Run]], None]] = [
    value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).get("make") == "Callable[..., Run]"
]


def failures(stage: int | None = None, offload: str = "none") -> list[str]:
    """Runs all checks on one backend.

    Returns:
        The names of those that failed, with what went wrong.
    """

    def make(**options: Any) -> Run:
        return Run(stage=stage, offload=offload, **options)

    found = []
    for check in CHECKS:
        try:
            check(make)
        except (Exception, pytest.fail.Exception):
            found.append(f"{check.__name__}:\n{traceback.format_exc(limit=-3)}")
    return found
