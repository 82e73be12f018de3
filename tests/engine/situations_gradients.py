"""Gradients read, changed and clipped between the backward pass and the step, and those that are not finite.

See `situations.py`, whose list these belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from tests.engine.contestants import NotAvailable
from tests.engine.loop import Kind, Loop, Wrong, demand
from zeroaccel.errors import UsageError

# --- read and changed ---------------------------------------------------------------------------------------------


def gradients_can_be_read(kind: Kind) -> float:
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.peer.backward(loop.peer.loss(number))
        loop.check_gradients()
        loop.step()
        loop.peer.step()
    return loop.check()


def gradients_can_be_edited_before_a_clipped_step(kind: Kind) -> float:
    loop = Loop(kind, needs=("clip",))
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.edit(lambda gradient: gradient.abs() * 3)
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.5)
        loop.step()
        loop.peer.backward(loop.peer.loss(number))
        loop.peer.edit(lambda gradient: gradient.abs() * 3)
        loop.peer.step(clip=0.5)
        loop.check_norm(norm)
    return loop.check()


def clipped_gradients_can_be_read_and_edited(kind: Kind) -> float:
    loop = Loop(kind, needs=("clip",))
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.5)
        loop.peer.backward(loop.peer.loss(number))
        loop.peer.clip(0.5)
        loop.check_gradients()
        loop.edit(lambda gradient: gradient * 2)
        loop.step()
        loop.peer.edit(lambda gradient: gradient * 2)
        loop.peer.step()
    return loop.check()


def gradients_edited_and_then_more_is_backwarded(kind: Kind) -> float:
    """Plain PyTorch adds to what was written; ZeRO cannot, and says so before anything is wrong."""
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.edit(lambda gradient: gradient * 2)
        loop.backward(loop.loss(number + 10))
        loop.step()
        loop.peer.backward(loop.peer.loss(number))
        loop.peer.edit(lambda gradient: gradient * 2)
        loop.peer.step(loop.peer.loss(number + 10))
    return loop.check()


def shards_of_gradients_can_be_read_and_edited(kind: Kind) -> float:
    """With DeepSpeed's functions for stage 3."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    if kind.stage != 3:
        raise NotAvailable("shards of a parameter")
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.peer.backward(loop.peer.loss(number))
        for parameter in loop.parameters().values():
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * 2)
        loop.peer.edit(lambda gradient: gradient * 2)
        loop.check_gradients()
        loop.step()
        loop.peer.step()
    return loop.check()


def padding_of_a_shard_counts_nowhere(kind: Kind) -> float:
    """What is written behind a parameter's end is not in this step's norm, nor in a later one's."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    if kind.stage != 3:
        raise NotAvailable("shards of a parameter")
    loop = Loop(kind, needs=("clip",))
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.peer.backward(loop.peer.loss(number))
        if number == 0:
            for parameter in loop.parameters().values():
                shard = safe_get_local_grad(parameter)
                behind = (
                    torch.arange(shard.numel(), device=shard.device) >= parameter.ds_numel - shard.numel() * loop.rank
                )
                safe_set_local_grad(parameter, torch.where(behind, 9.0, shard))
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.1)
        loop.step()
        loop.peer.step(clip=0.1)
        loop.check_norm(norm)
    return loop.check()


def gradients_updated_by_a_function(kind: Kind) -> float:
    """With DeepSpeed's function for stage 3."""
    from deepspeed.utils import safe_update_full_grad_vectorized

    if kind.stage != 3:
        raise NotAvailable("safe_update_full_grad_vectorized")
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        safe_update_full_grad_vectorized(list(loop.model.parameters()), lambda gradient, _: gradient * 2)
        loop.step()
        loop.peer.backward(loop.peer.loss(number))
        loop.peer.edit(lambda gradient: gradient * 2)
        loop.peer.step()
    return loop.check()


def the_attribute_grad_can_be_read_and_edited(kind: Kind) -> float:
    if kind.stage != 0:
        raise NotAvailable("parameter.grad")
    loop = Loop(kind)
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.peer.backward(loop.peer.loss(number))
        loop.check_gradients()
        for parameter in loop.parameters().values():
            if parameter.grad is not None:
                parameter.grad *= 2
        loop.step()
        loop.peer.edit(lambda gradient: gradient * 2)
        loop.peer.step()
    return loop.check()


def reading_in_an_open_window_is_refused(kind: Kind) -> float:
    if kind.stage == 0:
        raise NotAvailable("parameter.grad can be read at any time")
    loop = Loop(kind, steps=2, needs=("refusal",))
    for number in range(2):
        loop.backward(loop.loss(number))
        if number == 0:
            with suppress(UsageError):
                loop.gradients()
                raise Wrong("half a window's gradients were handed out")
        loop.step()
    loop.peer.step(loop.peer.loss(0) / 2, loop.peer.loss(1) / 2)
    return loop.check()


# --- clipped ------------------------------------------------------------------------------------------------------


def nothing_is_clipped_uninvited(kind: Kind) -> float:
    loop = Loop(kind, config={"gradient_clipping": None})
    for number in range(3):
        loop.backward(loop.loss(number) * 5)
        loop.step()
        loop.peer.step(loop.peer.loss(number) * 5)
        demand(loop.peer.norm > 1.0, "the norm is too small to be clipped")
    return loop.check()


def the_config_clips(kind: Kind) -> float:
    loop = Loop(kind, config={"gradient_clipping": 0.1})
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number), clip=0.1)
    return loop.check()


def gradients_clipped_by_norm(kind: Kind) -> float:
    loop = Loop(kind, needs=("clip",))
    for number in range(3):
        loop.backward(loop.loss(number))
        norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.1)
        loop.step()
        loop.peer.step(loop.peer.loss(number), clip=0.1)
        loop.check_norm(norm)
    return loop.check()


def gradients_clamped_by_value(kind: Kind) -> float:
    loop = Loop(kind, needs=("clip",))
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.accelerator.clip_grad_value_(loop.model.parameters(), 0.05)
        loop.step()
        loop.peer.backward(loop.peer.loss(number))
        loop.peer.edit(lambda gradient: gradient.clamp(-0.05, 0.05))
        loop.peer.step()
    return loop.check()


# --- the optimizer ------------------------------------------------------------------------------------------------


def the_optimizer_keeps_its_options(kind: Kind) -> float:
    """Whatever the library does under offload where the config says nothing."""
    loop = Loop(kind, config={"zero_force_ds_cpu_optimizer": None})
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


def an_optimizer_of_another_rule_is_kept(kind: Kind) -> float:
    """SGD with momentum; under offload it is PyTorch's own that steps, in CPU memory."""
    loop = Loop(kind, config={"zero_force_ds_cpu_optimizer": None}, rule="SGD")
    for number in range(3):
        loop.backward(loop.loss(number))
        loop.step()
        loop.peer.step(loop.peer.loss(number))
    return loop.check()


# --- not finite ---------------------------------------------------------------------------------------------------


def _steps_with_a_broken_one(loop: Loop) -> None:
    """Rank 0's second loss is infinite: all ranks skip that step, and the scheduler with it."""
    scheduler = loop.accelerator.prepare(torch.optim.lr_scheduler.StepLR(loop.optimizer, 100))
    for number in range(3):
        broken = number == 1 and loop.rank == 0
        loop.backward(loop.loss(number) * (float("inf") if broken else 1.0))
        before = scheduler.scheduler.last_epoch
        loop.optimizer.step()
        scheduler.step()
        loop.optimizer.zero_grad()
        demand(loop.optimizer.step_was_skipped is (number == 1), f"step {number}: step_was_skipped")
        demand((scheduler.scheduler.last_epoch == before) is (number == 1), f"step {number}: the scheduler")
        if number != 1:
            loop.peer.step(loop.peer.loss(number))


def a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(kind: Kind) -> float:
    if kind.precision == "no":
        raise NotAvailable("fp32 steps, as PyTorch does")
    loop = Loop(kind, needs=("scheduler",))
    _steps_with_a_broken_one(loop)
    return loop.check()


def an_overflow_halves_a_dynamic_loss_scale(kind: Kind) -> float:
    if kind.precision != "fp16":
        raise NotAvailable("loss scale")
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 7, "hysteresis": 1, "auto_cast": False}
    loop = Loop(kind, config={"fp16": fp16}, needs=("scheduler",))
    demand(loop.optimizer.optimizer.loss_scale == 128, "the loss scale does not begin where it shall")
    _steps_with_a_broken_one(loop)
    demand(loop.optimizer.optimizer.loss_scale == 64, "the loss scale is not halved")
    return loop.check()


SITUATIONS: list[Callable[[Kind], float]] = [
    gradients_can_be_read,
    gradients_can_be_edited_before_a_clipped_step,
    clipped_gradients_can_be_read_and_edited,
    gradients_edited_and_then_more_is_backwarded,
    shards_of_gradients_can_be_read_and_edited,
    padding_of_a_shard_counts_nowhere,
    gradients_updated_by_a_function,
    the_attribute_grad_can_be_read_and_edited,
    reading_in_an_open_window_is_refused,
    nothing_is_clipped_uninvited,
    the_config_clips,
    gradients_clipped_by_norm,
    gradients_clamped_by_value,
    the_optimizer_keeps_its_options,
    an_optimizer_of_another_rule_is_kept,
    a_gradient_that_is_not_finite_skips_the_step_on_all_ranks,
    an_overflow_halves_a_dynamic_loss_scale,
]
