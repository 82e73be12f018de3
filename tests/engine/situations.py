"""Loops that are right in plain PyTorch and that DeepSpeed, driven natively, trains wrong or not at all.

Every rank sees its own batches; `loop.py` holds the reference. A situation gives the largest difference of a weight,
raises `Wrong` where it is none of rounding, and `NotAvailable` where the kind of run has no such thing.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.engine import situations_gradients as gradients
from tests.engine.contestants import NotAvailable
from tests.engine.loop import Kind, Loop, Wrong, loss_of
from zeroaccel.errors import UsageError, ZeroAccelError

# --- several losses -----------------------------------------------------------------------------------------------


def one_loss(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


def two_losses_one_after_the_other(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.backward(loop.loss(number + 10))
        loop.step()
        loop.peer.step(loop.peer.loss(number), loop.peer.loss(number + 10))
    return loop.check()


def two_forwards_then_two_backwards(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.loss(number), loop.loss(number + 10)
        loop.backward(first)
        loop.backward(second)
        loop.step()
        loop.peer.step(loop.peer.loss(number), loop.peer.loss(number + 10))
    return loop.check()


def two_forwards_then_two_backwards_in_reverse(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.loss(number), loop.loss(number + 10)
        loop.backward(second)
        loop.backward(first)
        loop.step()
        loop.peer.step(loop.peer.loss(number), loop.peer.loss(number + 10))
    return loop.check()


def two_forwards_and_one_loss(kind: Kind) -> float:
    """As with contrastive losses, where one model sees both inputs."""
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.model(loop.batch(number)), loop.model(loop.batch(number + 10))
        loop.backward(loss_of(first * second))
        loop.step()
        model, batch = loop.peer.model, loop.peer.batch
        pairs = [(model(batch(number, rank)), model(batch(number + 10, rank))) for rank in range(loop.ranks)]
        loop.peer.step(torch.stack([loss_of(first * second) for first, second in pairs]).mean())
    return loop.check()


def losses_of_two_heads(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number, "a"))
        loop.backward(loop.loss(number, "b"))
        loop.step()
        loop.peer.step(loop.peer.loss(number, "a"), loop.peer.loss(number, "b"))
    return loop.check()


def a_head_used_on_alternate_steps(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(4):
        head = "ab"[number % 2]
        loop.backward(loop.loss(number, head))
        loop.step()
        loop.peer.step(loop.peer.loss(number, head))
    return loop.check()


def a_plain_loss_backward(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.loss(number).backward()  # type: ignore[no-untyped-call]
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


def a_plain_loss_backward_through_two_forwards(kind: Kind) -> float:
    loop = Loop(kind, steps=2, needs=("refusal",))
    for number in range(4):
        (loop.loss(number) * loop.loss(number + 10)).backward()
        loop.step()
    model, batch, ranks = loop.peer.model, loop.peer.batch, range(loop.ranks)

    def product(number: int, rank: int) -> torch.Tensor:
        return loss_of(model(batch(number, rank))) * loss_of(model(batch(number + 10, rank)))

    for window in ((0, 1), (2, 3)):
        loop.peer.step(*(torch.stack([product(number, rank) for rank in ranks]).mean() / 2 for number in window))
    return loop.check()


def a_parameter_without_dimensions(kind: Kind) -> float:
    loop = Loop(kind, scalar=True)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


# --- graphs -------------------------------------------------------------------------------------------------------


def a_graph_used_twice(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loss = loop.loss(number)
        loop.backward(loss, retain_graph=True)
        loop.backward(loss * loss)
        loop.step()
        model, batch = loop.peer.model, loop.peer.batch
        losses = [loss_of(model(batch(number, rank))) for rank in range(loop.ranks)]
        loop.peer.step(torch.stack([loss + loss * loss for loss in losses]).mean())
    return loop.check()


def a_trunk_kept_for_a_second_head(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        first, second = loop.model(loop.batch(number), "both")
        loop.backward(loss_of(first), retain_graph=True)
        loop.backward(loss_of(second))
        loop.step()
        loop.peer.step(loop.peer.loss(number, "a"), loop.peer.loss(number, "b"))
    return loop.check()


def a_graph_of_two_engines_used_twice(kind: Kind) -> float:
    one = Loop(kind)
    two = Loop(kind, shared=one, seed=4)
    for number in range(3):
        product = one.loss(number) * two.loss(number)
        one.backward(product, retain_graph=True)
        one.backward(product * product)
        for loop in (one, two):
            loop.step()
        losses = [
            loss_of(one.peer.model(one.peer.batch(number, rank)))
            * loss_of(two.peer.model(two.peer.batch(number, rank)))
            for rank in range(one.ranks)
        ]
        one.peer.backward(torch.stack([loss + loss * loss for loss in losses]).mean(), two.peer)
        for loop in (one, two):
            loop.peer.step()
    return max(one.check(), two.check())


def _computed_again(kind: Kind, recompute: str) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loss_of(loop.model(loop.batch(number), recompute=recompute)))
        loop.step()
        batches = [loop.peer.batch(number, rank) for rank in range(loop.ranks)]
        losses = [loss_of(loop.peer.model(batch, recompute=recompute)) for batch in batches]
        loop.peer.step(torch.stack(losses).mean())
    return loop.check()


def activations_computed_again(kind: Kind) -> float:
    return _computed_again(kind, "not reentrant")


def activations_computed_again_reentrantly(kind: Kind) -> float:
    return _computed_again(kind, "reentrant")


def activations_of_one_layer_computed_again_twice(kind: Kind) -> float:
    """Reentrantly: the layer gets two gradients in one backward pass."""
    return _computed_again(kind, "one layer twice")


# --- evaluation ---------------------------------------------------------------------------------------------------


def _evaluate(loop: Loop, number: int) -> None:
    loop.model.eval()
    with torch.no_grad():
        loop.loss(number)
    loop.model.train()


def evaluation_between_forward_and_backward(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loss = loop.loss(number)
        _evaluate(loop, number + 30)
        loop.backward(loss)
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


def evaluation_in_an_open_window(kind: Kind) -> float:
    loop = Loop(kind, steps=2)
    for number in range(6):
        with loop.accelerator.accumulate(loop.model):
            loop.backward(loop.loss(number))
            _evaluate(loop, number + 30)
            loop.step()
    for number in (0, 2, 4):
        loop.peer.step(loop.peer.loss(number) / 2, loop.peer.loss(number + 1) / 2)
    return loop.check()


# --- exceptions ---------------------------------------------------------------------------------------------------


def gradients_are_thrown_away_after_an_exception(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        with suppress(ArithmeticError):
            loop.backward(loop.loss(number + 20))
            raise ArithmeticError
        loop.optimizer.zero_grad()
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
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
            loop.backward(loss_of(Boom.apply(loop.model(loop.batch(number)))))
        loop.optimizer.zero_grad()
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


# --- several engines ----------------------------------------------------------------------------------------------


def one_backward_serves_two_engines(kind: Kind) -> float:
    one = Loop(kind)
    two = Loop(kind, shared=one, seed=4)
    for number in range(3):
        one.backward(one.loss(number) * 2 + two.loss(number) * one.loss(number + 10))
        for loop in (one, two):
            loop.step()
        batch = one.peer.batch
        losses = [
            loss_of(one.peer.model(batch(number, rank))) * 2
            + loss_of(two.peer.model(batch(number, rank))) * loss_of(one.peer.model(batch(number + 10, rank)))
            for rank in range(one.ranks)
        ]
        one.peer.backward(torch.stack(losses).mean(), two.peer)
        for loop in (one, two):
            loop.peer.step()
    return max(one.check(), two.check())


def two_engines_step_after_both_backward_passes(kind: Kind) -> float:
    """Each pass reaches one of them and passes by the other, whose window is open."""
    one = Loop(kind, steps=2)
    two = Loop(kind, steps=2, shared=one, seed=4)
    for number in range(6):
        for loop in (one, two):
            loop.backward(loop.loss(number))
        for loop in (one, two):
            loop.step()
    for loop in (one, two):
        for number in range(0, 6, 2):
            loop.peer.step(loop.peer.loss(number) / 2, loop.peer.loss(number + 1) / 2)
    return max(one.check(), two.check())


def _demand_native(kind: Kind) -> None:
    if (kind.stage, kind.precision) == (0, "fp16") or kind.offload == "nvme":
        raise NotAvailable("DeepSpeed's own loop: a scaled loss at stage 0; an unused layer's gradient on NVMe")


def an_engine_is_driven_natively_after_a_window(kind: Kind) -> float:
    _demand_native(kind)
    loop = Loop(kind, steps=2, needs=("refusal",))
    for number in range(4):
        if number < 2:
            loop.backward(loop.loss(number))
            loop.step()
        else:
            loop.model.backward(loop.loss(number))
            loop.model.step()
    for number in (0, 2):
        loop.peer.step(loop.peer.loss(number) / 2, loop.peer.loss(number + 1) / 2)
    return loop.check()


def an_engine_is_driven_natively_after_another_ones_pass(kind: Kind) -> float:
    """With `model.backward` and `model.step`, after a pass that came by without reaching it."""
    _demand_native(kind)
    one = Loop(kind)
    two = Loop(kind, shared=one, seed=4)
    one.backward(one.loss(0))
    one.step()
    one.peer.step(one.peer.loss(0))
    for number in range(3):
        two.model.backward(two.loss(number))
        two.model.step()
        two.peer.step(two.peer.loss(number))
    return max(one.check(), two.check())


def a_refused_backward_pass_changes_nothing(kind: Kind) -> float:
    loop = Loop(kind, needs=("refusal", "weight"))
    for number in range(3):
        loop.backward(loop.loss(number))
        refused = loop.loss(number + 10)
        try:
            loop.backward(refused, weight=3)  # beside one without a weight
        except UsageError:
            loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


def two_engines_alternate(kind: Kind) -> float:
    """As in a GAN: the generator's loss runs through the discriminator, which then throws its gradients away."""
    generator = Loop(kind)
    critic = Loop(kind, shared=generator, seed=4)

    def chained(first: Any, second: Any, x: torch.Tensor) -> torch.Tensor:
        made = first(x)
        return loss_of(second(torch.cat([made, made, made], dim=1)))

    for number in range(3):
        generator.backward(critic.loss(number))
        critic.step()
        generator.backward(chained(generator.model, critic.model, generator.batch(number)))
        generator.step()
        critic.optimizer.zero_grad()
        one, two = generator.peer, critic.peer
        two.step(two.loss(number))
        losses = [chained(one.model, two.model, one.batch(number, rank)) for rank in range(generator.ranks)]
        one.backward(torch.stack(losses).mean(), two)
        one.step()
        two.optimizer.zero_grad()
    return max(generator.check(), critic.check())


# --- accumulation windows -----------------------------------------------------------------------------------------


def accumulation_with_two_losses(kind: Kind) -> float:
    loop = Loop(kind, steps=2)
    for window in range(2):
        numbers = (2 * window, 2 * window + 1)
        for number in numbers:
            with loop.accelerator.accumulate(loop.model):
                # The context counts blocks, so this pair is one micro-batch.
                loop.backward(loop.loss(number, "a"))
                loop.backward(loop.loss(number, "b"))
                loop.step()
        loop.peer.step(*(loop.peer.loss(number, head) / 2 for number in numbers for head in "ab"))
    return loop.check()


def _batch_numbers(loop: Loop, count: int) -> Any:
    """A prepared loader of the numbers of each rank's batches."""
    loader = loop.accelerator.prepare(DataLoader(TensorDataset(torch.arange(count * loop.ranks)), batch_size=1))
    return loader, lambda number: int(number) // loop.ranks


def a_short_last_window(kind: Kind) -> float:
    loop = Loop(kind, steps=4)
    loader, index = _batch_numbers(loop, 6)
    for (number,) in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.backward(loop.loss(index(number)))
            loop.step()
    for window in _windows(4, 2):
        loop.peer.step(*(loop.peer.loss(number) / len(window) for number in window))
    return loop.check()


def a_short_last_window_is_clipped_by_its_true_norm(kind: Kind) -> float:
    loop = Loop(kind, steps=4, needs=("clip",))
    loader, index = _batch_numbers(loop, 6)
    windows = _windows(4, 2)
    for (number,) in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.backward(loop.loss(index(number)))
            if loop.accelerator.sync_gradients:
                norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.1)
                window = next(windows)
                loop.peer.step(*(loop.peer.loss(each) / len(window) for each in window), clip=0.1)
                loop.check_norm(norm)
            loop.step()
    return loop.check()


def a_window_that_the_library_counts_goes_on_in_the_next_epoch(kind: Kind) -> float:
    loop = Loop(kind, steps=2)
    loader, index = _batch_numbers(loop, 3)
    for _ in range(2):
        for (number,) in loader:
            loop.backward(loop.loss(index(number)))
            loop.step()
    for window in ((0, 1), (2, 0), (1, 2)):
        loop.peer.step(*(loop.peer.loss(number) / 2 for number in window))
    return loop.check()


def windows_of_accumulate_end_with_the_epoch(kind: Kind) -> float:
    loop = Loop(kind, steps=2)
    loader, index = _batch_numbers(loop, 3)
    for _ in range(2):
        for (number,) in loader:
            with loop.accelerator.accumulate(loop.model):
                loop.backward(loop.loss(index(number)))
                loop.step()
    for window in ((0, 1), (2,)) * 2:
        loop.peer.step(*(loop.peer.loss(number) / len(window) for number in window))
    return loop.check()


def no_sync_around_all_but_the_last(kind: Kind) -> float:
    """The script cuts its windows, as with DistributedDataParallel."""
    loop = Loop(kind, needs=("no_sync",))
    for number in range(0, 6, 2):
        with loop.accelerator.no_sync(loop.model):
            loop.backward(loop.loss(number) / 2)
        loop.backward(loop.loss(number + 1) / 2)
        loop.step()
        loop.peer.step(loop.peer.loss(number) / 2, loop.peer.loss(number + 1) / 2)
    return loop.check()


# --- losses weighted by tokens ------------------------------------------------------------------------------------

TOKENS = ((3, 1, 2, 3, 1, 2), (1, 2, 3, 3, 2, 1))  # of each rank's batches: how many of its rows count


def _token_losses(output: torch.Tensor, number: int, rank: int) -> torch.Tensor:
    """Sum over the rows that count."""
    return (output[: TOKENS[rank % 2][number]].float() - 1.0).square().mean(dim=1).sum()


def _one_big_batch(loop: Loop, numbers: Iterable[int], clip: float = float("inf")) -> None:
    cases = [(number, rank) for number in numbers for rank in range(loop.ranks)]
    total = sum(TOKENS[rank % 2][number] for number, rank in cases)
    sums = [_token_losses(loop.peer.model(loop.peer.batch(number, rank)), number, rank) for number, rank in cases]
    loop.peer.step(torch.stack(sums).sum() / total, clip=clip)


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
            loss = _token_losses(loop.model(loop.batch(number)), number, loop.rank) / in_all
            loop.backward(loss * loop.accelerator.gradient_accumulation_steps * loop.ranks)
        loop.step()
        _one_big_batch(loop, window)
    return loop.check()


def _backward_mean(loop: Loop, number: int) -> None:
    tokens = TOKENS[loop.rank % 2][number]
    loop.backward(_token_losses(loop.model(loop.batch(number)), number, loop.rank) / tokens, weight=tokens)


def a_loss_weighted_in_one_line(kind: Kind) -> float:
    """`accumulate()` cuts the windows, the last one short."""
    loop = Loop(kind, steps=4, needs=("weight",))
    loader, index = _batch_numbers(loop, 6)
    for (number,) in loader:
        with loop.accelerator.accumulate(loop.model):
            _backward_mean(loop, index(number))
            loop.step()
    for window in _windows(4, 2):
        _one_big_batch(loop, window)
    return loop.check()


def a_weighted_loss_is_clipped_by_its_true_norm(kind: Kind) -> float:
    loop = Loop(kind, needs=("weight",))
    for window in _windows(3, 2):
        for number in window:
            _backward_mean(loop, number)
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.05)
        loop.step()
        _one_big_batch(loop, window, clip=0.05)
        loop.check_norm(norm)
    return loop.check()


SITUATIONS: list[Callable[[Kind], float]] = [
    one_loss,
    two_losses_one_after_the_other,
    two_forwards_then_two_backwards,
    two_forwards_then_two_backwards_in_reverse,
    two_forwards_and_one_loss,
    losses_of_two_heads,
    a_head_used_on_alternate_steps,
    a_plain_loss_backward,
    a_plain_loss_backward_through_two_forwards,
    a_parameter_without_dimensions,
    a_graph_used_twice,
    a_trunk_kept_for_a_second_head,
    a_graph_of_two_engines_used_twice,
    activations_computed_again,
    activations_computed_again_reentrantly,
    activations_of_one_layer_computed_again_twice,
    evaluation_between_forward_and_backward,
    evaluation_in_an_open_window,
    gradients_are_thrown_away_after_an_exception,
    an_exception_in_the_backward_pass_leaves_no_trace,
    one_backward_serves_two_engines,
    two_engines_step_after_both_backward_passes,
    an_engine_is_driven_natively_after_a_window,
    an_engine_is_driven_natively_after_another_ones_pass,
    two_engines_alternate,
    accumulation_with_two_losses,
    a_short_last_window,
    a_short_last_window_is_clipped_by_its_true_norm,
    a_window_that_the_library_counts_goes_on_in_the_next_epoch,
    windows_of_accumulate_end_with_the_epoch,
    no_sync_around_all_but_the_last,
    the_token_weighted_recipe_of_the_guide,
    a_loss_weighted_in_one_line,
    a_weighted_loss_is_clipped_by_its_true_norm,
    a_refused_backward_pass_changes_nothing,
    *gradients.SITUATIONS,
]

# Where this library says no, with a clear error, instead of a wrong step.
REFUSED: dict[str, Callable[[Kind], bool]] = {
    # DeepSpeed has no hooks there, and fp16 needs its loss scaled.
    "a_plain_loss_backward": lambda kind: kind.stage == 0 or kind.precision == "fp16",
    "a_plain_loss_backward_through_two_forwards": lambda kind: kind.stage == 0 or kind.precision == "fp16",
    # ZeRO reduces a parameter's gradient while the pass runs, and here another one follows.
    "activations_of_one_layer_computed_again_twice": lambda kind: kind.stage >= 2,
    # ZeRO's averages are final once they were read; `parameter.grad` of stage 0 is not.
    "gradients_edited_and_then_more_is_backwarded": lambda kind: kind.stage > 0,
    # The gradients would have to be read from the disk and written again.
    "clipped_gradients_can_be_read_and_edited": lambda kind: kind.offload == "nvme",
    "gradients_clamped_by_value": lambda kind: kind.offload == "nvme",
}


@dataclass(frozen=True)
class Outcome:
    """How a situation ended on a rank.

    Attributes:
        how: "right", "wrong", "refused" (an error of this library's own), "error", "not available".
        distance: the largest difference, where there is a number.
        text: what was said.
    """

    how: str
    distance: float = math.nan
    text: str = ""


def outcome(kind: Kind, name: str) -> Outcome:
    """Runs the situation of that name."""
    situation = next(each for each in SITUATIONS if each.__name__ == name)
    try:
        return Outcome("right", situation(kind))
    except NotAvailable as reason:
        return Outcome("not available", text=str(reason))
    except Wrong as error:
        return Outcome("wrong", error.distance, traceback.format_exc(limit=-3))
    except ZeroAccelError as error:
        return Outcome("refused", text=f"{type(error).__name__}: {error}")
    except Exception:
        return Outcome("error", text=traceback.format_exc(limit=-6))
