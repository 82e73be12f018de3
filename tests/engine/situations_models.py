"""Loops over several models of one `Accelerator`, each with a plugin, and so a stage and a precision, of its own.

As in `situations.py` every loop stands beside plain PyTorch, and gives the largest difference of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.distributed.pool import reset_states
from tests.engine.contestants import BUCKET
from tests.engine.loop import BATCH, Kind, Loop, demand, loss_of, make_model

NAMES = ("first", "second")


@dataclass(frozen=True)
class Pair:
    """Two models.

    Attributes:
        first, second: how they run.
        steps: gradient accumulation steps of each.
    """

    first: Kind
    second: Kind
    steps: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        shown = f"{self.first}+{self.second}"
        return shown if self.steps == (1, 1) else f"{shown}-x{self.steps[0]}+x{self.steps[1]}"


def plugin_of(kind: Kind, steps: int, **fields: Any) -> Any:
    """What a script writes for one of its models."""
    from zeroaccel import DeepSpeedPlugin

    fields = {"zero3_init_flag": False, **fields}
    plugin = DeepSpeedPlugin(
        zero_stage=kind.stage,
        gradient_accumulation_steps=steps,
        offload_optimizer_device=kind.offload,
        offload_param_device=kind.offload if kind.stage == 3 else "none",
        **fields,
    )
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = BATCH
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    if kind.precision == "fp16":
        config["fp16"] = {"enabled": True, "auto_cast": False, "loss_scale": kind.loss_scale}
    elif kind.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return plugin


def start(pair: Pair, **fields: Any) -> Any:
    """An `Accelerator` with both plugins."""
    from zeroaccel import Accelerator

    reset_states()
    kinds = zip(NAMES, (pair.first, pair.second), pair.steps, strict=True)
    return Accelerator(deepspeed_plugins={name: plugin_of(kind, steps, **fields) for name, kind, steps in kinds})


def loop_of(accelerator: Any, pair: Pair, name: str) -> Loop:
    """One model, prepared with its plugin."""
    accelerator.state.select_deepspeed_plugin(name)
    holder: Any = SimpleNamespace(accelerator=accelerator)
    return Loop(getattr(pair, name), shared=holder, seed=3 + NAMES.index(name))


def loops_of(pair: Pair) -> tuple[Loop, Loop]:
    """Both models."""
    accelerator = start(pair)
    loops = loop_of(accelerator, pair, "first"), loop_of(accelerator, pair, "second")
    scales = [loop.peer._loss_scale for loop in loops]
    for loop in loops:  # a loss of both has one, of which the gradients of fp32 weights know nothing
        loop.peer._loss_scale = 1.0 if "no" in (pair.first.precision, pair.second.precision) else max(scales)
    return loops


def chained(first: Any, second: Any, x: torch.Tensor) -> torch.Tensor:
    """Loss of the second model on what the first one makes."""
    made = first(x)
    return loss_of(second(torch.cat([made, made, made], dim=1)))


def mean_of(loop: Loop, loss: Callable[[torch.Tensor], torch.Tensor], number: int) -> torch.Tensor:
    """The reference's loss: of all ranks' batches."""
    return torch.stack([loss(loop.peer.batch(number, rank)) for rank in range(loop.ranks)]).mean()


# --- two models that train ------------------------------------------------------------------------------------------


def each_by_itself(pair: Pair) -> float:
    loops = loops_of(pair)
    for number in range(3):
        for loop in loops:
            loop.backward(loop.loss(number))
            loop.step()
            loop.peer.step(loop.peer.loss(number))
    return max(loop.check() for loop in loops)


def one_loss_of_both(pair: Pair) -> float:
    one, two = loops_of(pair)
    for number in range(3):
        one.backward(one.loss(number) * two.loss(number))
        one.step()
        two.step()
        first, second = one.peer.model, two.peer.model
        one.peer.backward(mean_of(one, lambda x: loss_of(first(x)) * loss_of(second(x)), number), two.peer)  # noqa: B023
        one.peer.step()
        two.peer.step()
    return max(one.check(), two.check())


def in_turn(pair: Pair) -> float:
    """As in a GAN: the generator's loss runs through the critic, which then throws its gradients away."""
    generator, critic = loops_of(pair)
    for number in range(3):
        critic.optimizer.zero_grad()
        critic.backward(critic.loss(number))
        critic.optimizer.step()
        generator.optimizer.zero_grad()
        generator.backward(chained(generator.model, critic.model, generator.batch(number)))
        generator.optimizer.step()
        _in_turn_reference(generator, critic, number)
    critic.optimizer.zero_grad()
    return max(generator.check(), critic.check())


def in_turn_with_the_critic_frozen_meanwhile(pair: Pair) -> float:
    generator, critic = loops_of(pair)
    for number in range(3):
        critic.backward(critic.loss(number))
        critic.step()
        critic.model.requires_grad_(False)
        generator.backward(chained(generator.model, critic.model, generator.batch(number)))
        generator.step()
        _demand_released(critic.model)
        critic.model.requires_grad_(True)
        _in_turn_reference(generator, critic, number)
    return max(generator.check(), critic.check())


def in_turn_in_blocks_of_accumulate(pair: Pair) -> float:
    """The gradients that the generator's pass leaves in the critic are gone before the critic's next window."""
    generator, critic = loops_of(pair)
    accelerator = generator.accelerator
    for number in range(3):
        with accelerator.accumulate(critic.model):
            critic.optimizer.zero_grad()
            critic.backward(critic.loss(number))
            critic.optimizer.step()
        with accelerator.accumulate(generator.model):
            generator.optimizer.zero_grad()
            generator.backward(chained(generator.model, critic.model, generator.batch(number)))
            generator.optimizer.step()
        _in_turn_reference(generator, critic, number)
    return max(generator.check(), critic.check())


def _in_turn_reference(generator: Loop, critic: Loop, number: int) -> None:
    one, two = generator.peer, critic.peer
    two.step(two.loss(number))
    one.backward(mean_of(generator, lambda x: chained(one.model, two.model, x), number), two)
    one.step()
    two.optimizer.zero_grad()


# --- one that trains and one that does not ----------------------------------------------------------------------------


def _teacher(accelerator: Any, kind: Kind) -> tuple[Any, Any]:
    """A frozen model, prepared without an optimizer, and its like in plain PyTorch."""
    accelerator.state.select_deepspeed_plugin("second")
    model, plain = (make_model(kind, seed=7).requires_grad_(False).eval() for _ in range(2))
    prepared = accelerator.prepare(model)
    return prepared, plain.to(accelerator.device, next(prepared.parameters()).dtype)


def _student(pair: Pair) -> tuple[Loop, Any, Any]:
    accelerator = start(pair)
    teacher, plain = _teacher(accelerator, pair.second)  # first, as it has no loader either
    return loop_of(accelerator, pair, "first"), teacher, plain


def _imitate(student: Any, teacher: Any, x: torch.Tensor) -> torch.Tensor:
    return (student(x).float() - teacher(x).float()).square().mean()


def a_student_imitates_a_teacher(pair: Pair) -> float:
    loop, teacher, plain = _student(pair)
    for number in range(3):
        if number == 1:  # with and without
            with torch.no_grad():
                wanted = teacher(loop.batch(number)).float()
            loop.backward((loop.model(loop.batch(number)).float() - wanted).square().mean())
        else:
            loop.backward(_imitate(loop.model, teacher, loop.batch(number)))
        loop.step()
        loop.peer.step(mean_of(loop, lambda x: _imitate(loop.peer.model, plain, x), number))
    return loop.check()


def _judged(student: tuple[Loop, Any, Any]) -> Iterator[None]:
    """Trains the student on gradients that run through the teacher; pauses behind each step."""
    loop, teacher, plain = student
    for number in range(3):
        loop.backward(chained(loop.model, teacher, loop.batch(number)))
        loop.step()
        loop.peer.step(mean_of(loop, lambda x: chained(loop.peer.model, plain, x), number))
        yield


def a_student_is_judged_by_a_teacher(pair: Pair) -> float:
    """The gradient runs through the teacher, as in a perceptual loss."""
    student = loop, teacher, _ = _student(pair)
    for _ in _judged(student):
        _demand_released(teacher)
    return loop.check()


def _demand_released(model: Any) -> None:
    """Stage 3 holds no weights any more."""
    held = [p for p in model.parameters() if hasattr(p, "ds_status") and p.ds_status.name != "NOT_AVAILABLE"]
    demand(not held, f"{len(held)} weights stay gathered after the backward pass")


def a_student_is_judged_by_a_teacher_that_nobody_froze(pair: Pair) -> float:
    """Nothing steps on its own gradients."""
    student = loop, teacher, _ = _student(pair)
    teacher.requires_grad_(True)
    for _ in _judged(student):
        pass
    return loop.check()


def a_reference_answers_within_the_policys_window(pair: Pair) -> float:
    """As in preference optimization: the reference sees the same batch while the policy accumulates."""
    loop, reference, plain = _student(pair)
    accelerator = loop.accelerator
    for number in range(4):
        with accelerator.accumulate(loop.model):
            loss = loop.loss(number)
            with torch.no_grad():
                wanted = reference(loop.batch(number)).float()
            loop.backward(loss + (loop.model(loop.batch(number)).float() - wanted).square().mean())
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    steps = pair.steps[0]
    for window in range(0, 4, steps):
        numbers = range(window, window + steps)
        losses = [
            loop.peer.loss(number) + mean_of(loop, lambda x: _imitate(loop.peer.model, plain, x), number)
            for number in numbers
        ]
        loop.peer.step(torch.stack(losses).sum() / steps)
    return loop.check()


# --- different accumulation -------------------------------------------------------------------------------------------


def _counted(pair: Pair, in_blocks: bool) -> float:
    loops = loops_of(pair)
    accelerator = loops[0].accelerator
    for number in range(4):
        for loop in loops:
            if in_blocks:
                with accelerator.accumulate(loop.model):
                    loop.backward(loop.loss(number))
                    loop.step()
            else:
                loop.backward(loop.loss(number))
                loop.step()
    for loop, steps in zip(loops, pair.steps, strict=True):
        for window in range(0, 4, steps):
            loop.peer.step(*(loop.peer.loss(number) / steps for number in range(window, window + steps)))
    return max(loop.check() for loop in loops)


def each_accumulates_its_own_number(pair: Pair) -> float:
    return _counted(pair, in_blocks=False)


def each_accumulates_its_own_number_in_its_blocks(pair: Pair) -> float:
    return _counted(pair, in_blocks=True)


def one_loss_of_both_over_their_own_numbers(pair: Pair) -> float:
    one, two = loops_of(pair)
    for number in range(4):
        one.backward(one.loss(number) * two.loss(number))
        for loop in (one, two):
            loop.step()
    return _one_loss_reference(one, two, pair)


def _one_loss_reference(one: Loop, two: Loop, pair: Pair) -> float:
    """Each model's gradient of the loss is divided by its own number."""
    first, second = one.peer.model, two.peer.model
    sizes = {
        parameter: steps
        for model, steps in zip((first, second), pair.steps, strict=True)
        for parameter in model.parameters()
    }
    for number in range(4):
        loss = mean_of(one, lambda x: loss_of(first(x)) * loss_of(second(x)), number)
        gradients = torch.autograd.grad(loss, list(sizes), allow_unused=True, materialize_grads=True)
        for (parameter, steps), gradient in zip(sizes.items(), gradients, strict=True):
            parameter.grad = gradient / steps if parameter.grad is None else parameter.grad + gradient / steps
        for loop, steps in zip((one, two), pair.steps, strict=True):
            if (number + 1) % steps == 0:
                loop.peer.step()
    return max(one.check(), two.check())


def each_clips_as_its_plugin_says(pair: Pair) -> float:
    accelerator = start(pair)
    accelerator.state.get_deepspeed_plugin("second").deepspeed_config["gradient_clipping"] = 0.1
    loops = loop_of(accelerator, pair, "first"), loop_of(accelerator, pair, "second")
    for number in range(3):
        for loop, clip in zip(loops, (float("inf"), 0.1), strict=True):
            loop.backward(loop.loss(number))
            loop.step()
            loop.peer.step(loop.peer.loss(number), clip=clip)
    return max(loop.check() for loop in loops)


def models_of_two_accelerators(pair: Pair) -> float:
    """The second one shares plugins and processes, and nothing else."""
    from zeroaccel import Accelerator

    first = start(pair)
    second = Accelerator(deepspeed_plugins=first.state.deepspeed_plugins)
    third = Accelerator()
    demand(third.state.deepspeed_plugins is first.state.deepspeed_plugins, "other plugins")
    loops = loop_of(first, pair, "first"), loop_of(third, pair, "second")
    demand([len(each._models) for each in (first, second, third)] == [1, 0, 1], "models are mixed up")
    for number in range(4):
        for loop in loops:
            with loop.accelerator.accumulate(loop.model):
                loop.backward(loop.loss(number))
                loop.step()
    for loop, steps in zip(loops, pair.steps, strict=True):
        for window in range(0, 4, steps):
            loop.peer.step(*(loop.peer.loss(number) / steps for number in range(window, window + steps)))
    return max(loop.check() for loop in loops)


TRAINED = [
    each_by_itself,
    each_clips_as_its_plugin_says,
    one_loss_of_both,
    in_turn,
    in_turn_with_the_critic_frozen_meanwhile,
    in_turn_in_blocks_of_accumulate,
]
WITH_TEACHER = [
    a_student_imitates_a_teacher,
    a_student_is_judged_by_a_teacher,
    a_student_is_judged_by_a_teacher_that_nobody_froze,
]
WITH_REFERENCE = [a_reference_answers_within_the_policys_window]
ACCUMULATED = [
    models_of_two_accelerators,
    each_accumulates_its_own_number,
    each_accumulates_its_own_number_in_its_blocks,
    one_loss_of_both_over_their_own_numbers,
]
