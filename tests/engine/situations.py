"""Loops that are right in plain PyTorch and that DeepSpeed, driven natively, trains wrong or not at all.

Every rank sees its own batches. The reference is plain PyTorch in one process, on the mean of all ranks' losses;
a parameter without a gradient counts as gradient zero, as it does under ZeRO.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.pool import reset_states
from tests.parity.problem import full_weights
from zeroaccel.errors import UsageError

FEATURES, BATCH = 6, 3
TOLERANCE = {"no": 2e-6, "bf16": 4e-2, "fp16": 4e-3}


class Net(nn.Module):
    """A trunk with two heads, a parameter without dimensions, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head_a = nn.Linear(8, 2)
        self.head_b = nn.Linear(8, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, head: str = "a") -> Any:
        hidden = torch.tanh(self.trunk(x.to(self.trunk.weight.dtype))) * self.scale
        if head == "both":
            return self.head_a(hidden), self.head_b(hidden)
        return self.head_a(hidden) if head == "a" else self.head_b(hidden)


def make_model(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_optimizer(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, **options})


def batch_of(number: int, rank: int) -> torch.Tensor:
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(100 * number + rank))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output.float() - 1.0).square().mean()


@dataclass
class Kind:
    """A way to run: stage, optimizer offload, precision."""

    stage: int = 2
    offload: str = "none"
    precision: str = "no"
    nvme_path: str = ""

    def __str__(self) -> str:
        return "-".join([f"stage{self.stage}", self.offload, self.precision])


class Loop:
    """A prepared model and its reference.

    Attributes:
        accelerator, model, optimizer: the library's.
        peer: plain PyTorch's model, `peer_optimizer` its optimizer.
    """

    def __init__(self, kind: Kind, steps: int = 1, shared: Loop | None = None, seed: int = 3) -> None:
        self.kind = kind
        self.accelerator = shared.accelerator if shared else _accelerator(kind, steps)
        self.ranks = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        model = make_model(seed)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        self.peer = make_model(seed)
        self.peer_optimizer = make_optimizer(self.peer)
        self.device = self.accelerator.device

    def loss(self, number: int, head: str = "a") -> torch.Tensor:
        return loss_of(self.model(batch_of(number, self.rank).to(self.device), head))

    def peer_loss(self, number: int, head: str = "a") -> torch.Tensor:
        losses = [loss_of(self.peer(batch_of(number, rank), head)) for rank in range(self.ranks)]
        return torch.stack(losses).mean()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peer_step(self, *losses: torch.Tensor, clip: float = float("inf")) -> None:
        """One step of the reference on the sum of the losses."""
        sum(losses, torch.zeros(())).backward()
        self.peer_end(clip)

    def peer_end(self, clip: float = float("inf")) -> None:
        for parameter in self.peer.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.peer_norm = float(torch.nn.utils.clip_grad_norm_(self.peer.parameters(), clip))
        self.peer_optimizer.step()
        self.peer_optimizer.zero_grad()

    def peer_gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.peer.named_parameters()
        }

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients, before the step; unused parameters may have none at stage 0."""
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(parameter) for name, parameter in self.model.module.named_parameters()}
        scale = self.optimizer.optimizer.loss_scale if self.kind.stage == 0 and self.kind.precision == "fp16" else 1.0
        return {name: value.float().cpu() / scale for name, value in found.items() if value is not None}

    def set_gradient(self, name: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        parameter = dict(self.model.module.named_parameters())[name]
        scale = self.optimizer.optimizer.loss_scale if self.kind.stage == 0 and self.kind.precision == "fp16" else 1.0
        safe_set_full_grad(parameter, (value * scale).to(self.device))

    def both_heads(self, model: Any, number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of both heads on one trunk."""
        device = self.device if model is self.model else None
        first, second = model(batch_of(number, rank).to(device), "both")
        return loss_of(first), loss_of(second)

    def check_norm(self, norm: torch.Tensor) -> None:
        """The norm is that of the reference's last step."""
        assert abs(float(norm) - self.peer_norm) <= max(TOLERANCE[self.kind.precision], 1e-5) * max(self.peer_norm, 1.0)

    def check(self) -> float:
        """The largest difference of a weight, which must be one of rounding."""
        expected = dict(self.peer.named_parameters())
        distances = {
            name: float((weight - expected[name].detach()).abs().max())
            for name, weight in full_weights(self.model).items()
        }
        name, distance = max(distances.items(), key=lambda item: item[1])
        assert distance <= TOLERANCE[self.kind.precision], f"{name} differs by {distance:.1e}"
        return distance


def _accelerator(kind: Kind, steps: int) -> Any:
    from zeroaccel import Accelerator, DeepSpeedPlugin

    reset_states()
    path = kind.nvme_path or None
    plugin = DeepSpeedPlugin(
        zero_stage=kind.stage,
        gradient_accumulation_steps=steps,
        offload_optimizer_device=kind.offload,
        offload_optimizer_nvme_path=path if kind.offload == "nvme" else None,
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    if kind.precision == "fp16":  # a static scale, under which no step overflows
        plugin.deepspeed_config["fp16"] = {"enabled": True, "auto_cast": False, "loss_scale": 128.0}
    return Accelerator(mixed_precision=kind.precision, deepspeed_plugin=plugin)


# --- several losses -----------------------------------------------------------------------------------------------


def two_losses_one_after_the_other(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.accelerator.backward(loop.loss(number))
        loop.accelerator.backward(loop.loss(number + 10))
        loop.step()
        loop.peer_step(loop.peer_loss(number), loop.peer_loss(number + 10))
    return loop.check()


def two_forwards_then_two_backwards(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.loss(number), loop.loss(number + 10)
        loop.accelerator.backward(first)
        loop.accelerator.backward(second)
        loop.step()
        loop.peer_step(loop.peer_loss(number), loop.peer_loss(number + 10))
    return loop.check()


def two_forwards_then_two_backwards_in_reverse(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.loss(number), loop.loss(number + 10)
        loop.accelerator.backward(second)
        loop.accelerator.backward(first)
        loop.step()
        loop.peer_step(loop.peer_loss(number), loop.peer_loss(number + 10))
    return loop.check()


def losses_of_two_heads(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.accelerator.backward(loop.loss(number, "a"))
        loop.accelerator.backward(loop.loss(number, "b"))
        loop.step()
        loop.peer_step(loop.peer_loss(number, "a"), loop.peer_loss(number, "b"))
    return loop.check()


def a_head_used_on_alternate_steps(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(4):
        head = "ab"[number % 2]
        loop.accelerator.backward(loop.loss(number, head))
        loop.step()
        loop.peer_step(loop.peer_loss(number, head))
    return loop.check()


def accumulation_with_two_losses(kind: Kind) -> float:
    loop = Loop(kind, steps=2)
    for window in range(2):
        numbers = (2 * window, 2 * window + 1)
        for number in numbers:
            with loop.accelerator.accumulate(loop.model):
                # The context counts blocks, so this pair is one micro-batch.
                loop.accelerator.backward(loop.loss(number, "a"))
                loop.accelerator.backward(loop.loss(number, "b"))
                loop.step()
        loop.peer_step(*(loop.peer_loss(number, head) / 2 for number in numbers for head in "ab"))
    return loop.check()


# --- exceptions ---------------------------------------------------------------------------------------------------


def gradients_are_thrown_away_after_an_exception(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        with suppress(ArithmeticError):
            loop.accelerator.backward(loop.loss(number + 20))
            raise ArithmeticError
        loop.optimizer.zero_grad()
        loop.accelerator.backward(loop.loss(number))
        loop.step()
        loop.peer_step(loop.peer_loss(number))
    return loop.check()


def an_exception_in_the_backward_pass_leaves_no_trace(kind: Kind) -> float:
    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            raise ArithmeticError("boom")

    loop = Loop(kind)
    for number in range(3):
        with suppress(ArithmeticError):
            output = loop.model(batch_of(number, loop.rank).to(loop.device))
            loop.accelerator.backward(loss_of(Boom.apply(output)))
        loop.optimizer.zero_grad()
        loop.accelerator.backward(loop.loss(number))
        loop.step()
        loop.peer_step(loop.peer_loss(number))
    return loop.check()


# --- several engines ----------------------------------------------------------------------------------------------


def one_backward_serves_two_engines(kind: Kind) -> float:
    one = Loop(kind)
    two = Loop(kind, shared=one, seed=4)
    for number in range(3):
        one.accelerator.backward(one.loss(number) * 2 + two.loss(number) * one.loss(number + 10))
        for loop in (one, two):
            loop.step()
        losses = [
            loss_of(one.peer(batch_of(number, rank))) * 2
            + loss_of(two.peer(batch_of(number, rank))) * loss_of(one.peer(batch_of(number + 10, rank)))
            for rank in range(one.ranks)
        ]
        torch.stack(losses).mean().backward()
        for loop in (one, two):
            loop.peer_end()
    return max(one.check(), two.check())


def two_engines_alternate(kind: Kind) -> float:
    """As in a GAN: the generator's loss runs through the discriminator, which then throws its gradients away."""
    generator = Loop(kind)
    critic = Loop(kind, shared=generator, seed=4)

    def chained(first: Any, second: Any, x: torch.Tensor) -> torch.Tensor:
        made = first(x)
        return loss_of(second(torch.cat([made, made, made], dim=1)))

    for number in range(3):
        x = batch_of(number, generator.rank).to(generator.device)
        generator.accelerator.backward(critic.loss(number))
        critic.step()
        generator.accelerator.backward(chained(generator.model, critic.model, x))
        generator.step()
        critic.optimizer.zero_grad()
        critic.peer_step(critic.peer_loss(number))
        losses = [chained(generator.peer, critic.peer, batch_of(number, rank)) for rank in range(generator.ranks)]
        torch.stack(losses).mean().backward()
        generator.peer_end()
        critic.peer_optimizer.zero_grad()
    return max(generator.check(), critic.check())


# --- losses weighted by tokens ------------------------------------------------------------------------------------

TOKENS = ((3, 1, 2, 3, 1, 2), (1, 2, 3, 3, 2, 1))  # of each rank's batches: how many of its rows count


def _token_losses(model: Any, number: int, rank: int, device: Any = None) -> torch.Tensor:
    """Sum over the rows that count."""
    output = model(batch_of(number, rank).to(device))[: TOKENS[rank % 2][number]]
    return (output.float() - 1.0).square().mean(dim=1).sum()


def _one_big_batch(loop: Loop, numbers: Iterable[int], clip: float = float("inf")) -> None:
    listed = list(numbers)
    total = sum(TOKENS[rank % 2][number] for number in listed for rank in range(loop.ranks))
    sums = [_token_losses(loop.peer, number, rank) for number in listed for rank in range(loop.ranks)]
    loop.peer_step(torch.stack(sums).sum() / total, clip=clip)


def _windows(size: int, last: int) -> Iterator[range]:
    yield range(size)
    yield range(size, size + last)


def the_token_weighted_recipe_of_the_guide(kind: Kind) -> float:
    """The script cuts its windows, gathers the token count, and multiplies by steps and ranks."""
    loop = Loop(kind, steps=4)
    for window in _windows(4, 2):
        own = sum(TOKENS[loop.rank % 2][number] for number in window)
        in_all = loop.accelerator.gather(torch.tensor([own], device=loop.device)).sum()
        for number in window:
            loop.accelerator.sync_gradients = number == window[-1]
            loss = _token_losses(loop.model, number, loop.rank, loop.device) / in_all
            loop.accelerator.backward(loss * loop.accelerator.gradient_accumulation_steps * loop.ranks)
        loop.step()
        _one_big_batch(loop, window)
    return loop.check()


def a_loss_weighted_in_one_line(kind: Kind) -> float:
    """`accumulate()` cuts the windows, the last one short."""
    loop = Loop(kind, steps=4)
    numbers = DataLoader(TensorDataset(torch.arange(6 * loop.ranks)), batch_size=1)
    for (number,) in loop.accelerator.prepare(numbers):
        with loop.accelerator.accumulate(loop.model):
            _backward_mean(loop, int(number) // loop.ranks)
            loop.step()
    for window in _windows(4, 2):
        _one_big_batch(loop, window)
    return loop.check()


def _backward_mean(loop: Loop, number: int) -> None:
    tokens = TOKENS[loop.rank % 2][number]
    mean = _token_losses(loop.model, number, loop.rank, loop.device) / tokens
    loop.accelerator.backward(mean, weight=tokens)


def a_weighted_loss_is_clipped_by_its_true_norm(kind: Kind) -> float:
    loop = Loop(kind)
    for window in _windows(3, 2):
        for number in window:
            _backward_mean(loop, number)
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.05)
        loop.step()
        _one_big_batch(loop, window, clip=0.05)
        loop.check_norm(norm)
    return loop.check()


# --- a graph that is kept -----------------------------------------------------------------------------------------


def a_graph_used_twice(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loss = loop.loss(number)
        loop.accelerator.backward(loss, retain_graph=True)
        loop.accelerator.backward(loss * loss)
        loop.step()
        losses = [loss_of(loop.peer(batch_of(number, rank))) for rank in range(loop.ranks)]
        loop.peer_step(torch.stack([loss + loss * loss for loss in losses]).mean())
    return loop.check()


def a_trunk_kept_for_a_second_head(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.both_heads(loop.model, number, loop.rank)
        loop.accelerator.backward(first, retain_graph=True)
        loop.accelerator.backward(second)
        loop.step()
        pairs = [loop.both_heads(loop.peer, number, rank) for rank in range(loop.ranks)]
        loop.peer_step(torch.stack([first + second for first, second in pairs]).mean())
    return loop.check()


# --- gradients read and changed before the step -------------------------------------------------------------------


def gradients_can_be_read(kind: Kind) -> float:
    loop = Loop(kind)
    worst = 0.0
    for number in range(3):
        loop.accelerator.backward(loop.loss(number))
        loop.peer_loss(number).backward()
        expected = loop.peer_gradients()
        for name, gradient in loop.gradients().items():
            worst = max(worst, float((gradient - expected[name]).abs().max()))
        loop.step()
        loop.peer_end()
    assert worst <= TOLERANCE[kind.precision], f"a gradient differs by {worst:.1e}"
    return max(worst, loop.check())


def gradients_can_be_edited_before_a_clipped_step(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.accelerator.backward(loop.loss(number))
        for name, gradient in loop.gradients().items():
            loop.set_gradient(name, gradient.abs() * 3)
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.5)
        loop.step()
        loop.peer_loss(number).backward()
        for parameter in loop.peer.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.abs() * 3
        loop.peer_end(clip=0.5)
        loop.check_norm(norm)
    return loop.check()


def clipped_gradients_can_be_read_and_edited(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.accelerator.backward(loop.loss(number))
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.5)
        for name, gradient in loop.gradients().items():
            loop.set_gradient(name, gradient * 2)
        loop.step()
        loop.peer_loss(number).backward()
        torch.nn.utils.clip_grad_norm_(loop.peer.parameters(), 0.5)
        for parameter in loop.peer.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2
        loop.peer_end()
    return loop.check()


def reading_in_an_open_window_is_refused(kind: Kind) -> float:
    if kind.stage == 0:  # where `parameter.grad` is an attribute
        return 0.0
    loop = Loop(kind, steps=2)
    for number in range(2):
        loop.accelerator.backward(loop.loss(number))
        if number == 0:
            with pytest.raises(UsageError, match="1 of 2 micro-batches"):
                loop.gradients()
        loop.step()
    loop.peer_step(loop.peer_loss(0) / 2, loop.peer_loss(1) / 2)
    return loop.check()


# --- gradients that are not finite --------------------------------------------------------------------------------


def a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(kind: Kind) -> float:
    if kind.precision == "no":  # as PyTorch, which steps
        return 0.0
    loop = Loop(kind)
    scheduler = loop.accelerator.prepare(torch.optim.lr_scheduler.StepLR(loop.optimizer, 100))
    for number in range(3):
        broken = number == 1 and loop.rank == 0
        loop.accelerator.backward(loop.loss(number) * (float("inf") if broken else 1.0))
        before = scheduler.scheduler.last_epoch
        loop.optimizer.step()
        scheduler.step()
        loop.optimizer.zero_grad()
        assert loop.optimizer.step_was_skipped is (number == 1)
        assert (scheduler.scheduler.last_epoch == before) is (number == 1)
        if number != 1:
            loop.peer_step(loop.peer_loss(number))
    return loop.check()


SITUATIONS: list[Callable[[Kind], float]] = [
    two_losses_one_after_the_other,
    two_forwards_then_two_backwards,
    two_forwards_then_two_backwards_in_reverse,
    losses_of_two_heads,
    a_head_used_on_alternate_steps,
    accumulation_with_two_losses,
    gradients_are_thrown_away_after_an_exception,
    an_exception_in_the_backward_pass_leaves_no_trace,
    one_backward_serves_two_engines,
    two_engines_alternate,
    the_token_weighted_recipe_of_the_guide,
    a_loss_weighted_in_one_line,
    a_weighted_loss_is_clipped_by_its_true_norm,
    a_graph_used_twice,
    a_trunk_kept_for_a_second_head,
    gradients_can_be_read,
    gradients_can_be_edited_before_a_clipped_step,
    clipped_gradients_can_be_read_and_edited,
    reading_in_an_open_window_is_refused,
    a_gradient_that_is_not_finite_skips_the_step_on_all_ranks,
]


def failures(kind: Kind) -> dict[str, str]:
    """The situations that went wrong, with how."""
    found = {}
    for situation in SITUATIONS:
        try:
            situation(kind)
        except Exception:
            found[situation.__name__] = traceback.format_exc(limit=-4)
    return found
