"""Several losses, heads, engines, exceptions: right on every stage. `situations.py` holds the loops."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.engine.contestants import make_accelerator
from tests.engine.loop import TOLERANCE, Kind, Loop, Wrong
from tests.engine.situations import REFUSED, SITUATIONS, outcome
from tests.parity.problem import full_weights
from tests.parity.test_weights import wide_loss, wide_model

STAGES = ((0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"), (3, "nvme"))
FULL = [Kind(stage, offload, precision) for precision in ("no", "bf16", "fp16") for stage, offload in STAGES]
SELECTED = [Kind(0), Kind(1), Kind(2), Kind(3), Kind(2, "cpu"), Kind(2, precision="bf16"), Kind(2, precision="fp16")]


@pytest.mark.parametrize("kind", SELECTED, ids=str)
def test_ordinary_loops_give_pytorchs_weights(kind: Kind, ranks: RankPool, tmp_path: Path) -> None:
    check(kind, ranks, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("kind", FULL, ids=str)
def test_ordinary_loops_everywhere(kind: Kind, ranks: RankPool, tmp_path: Path) -> None:
    check(kind, ranks, tmp_path)


def check(kind: Kind, ranks: RankPool, folder: Path) -> None:
    placed = Kind(kind.stage, kind.offload, kind.precision, nvme_path=str(folder))
    problems = []
    for situation in SITUATIONS:
        name = situation.__name__
        refused = name in REFUSED and REFUSED[name](kind)
        for rank, found in enumerate(ranks.run(outcome, kind=placed, name=name, timeout=60)):
            if found.how not in (("refused",) if refused else ("right", "not available")):
                problems.append(f"{name}, rank {rank}: {found.how}\n{found.text}")
    assert not problems, "\n".join(problems)


# --- the comparison itself can fail -------------------------------------------------------------------------------


def the_second_loss_left_out(loop: Loop, number: int) -> None:
    loop.peer.step(loop.peer.loss(number))


def gradients_twice_as_large(loop: Loop, number: int) -> None:
    loop.peer.step(loop.peer.loss(number) * 2, loop.peer.loss(number + 10) * 2)


def a_quarter_of_a_gradient_too_much(loop: Loop, number: int) -> None:
    loop.peer.step(loop.peer.loss(number) * 1.25, loop.peer.loss(number + 10) * 1.25)


def two_steps_for_one(loop: Loop, number: int) -> None:
    loop.peer.step(loop.peer.loss(number))
    loop.peer.step(loop.peer.loss(number + 10))


MISTAKES = [the_second_loss_left_out, gradients_twice_as_large, a_quarter_of_a_gradient_too_much, two_steps_for_one]


def distances_of_mistakes(precision: str) -> dict[str, float]:
    """How far the right loop is from references that are wrong."""
    found = {}
    for mistake in MISTAKES:
        loop = Loop(Kind(2, precision=precision))
        for number in range(3):
            loop.backward(loop.loss(number))
            loop.backward(loop.loss(number + 10))
            loop.step()
            mistake(loop, number)
        try:
            found[mistake.__name__] = loop.check()
        except Wrong as wrong:
            found[mistake.__name__] = -wrong.distance
    return found


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_wrong_loop_is_found(precision: str, ranks: RankPool) -> None:
    for found in ranks.run(distances_of_mistakes, precision=precision):
        accepted = {name: distance for name, distance in found.items() if distance >= 0}
        assert not accepted, f"within {TOLERANCE[precision]}: {accepted}"


# --- gradients of whole layers on the disk ------------------------------------------------------------------------

HIDDEN = 1300  # whose gradients begin between two of the disk's blocks


def edited_on_nvme(nvme_path: str) -> float:
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    accelerator = make_accelerator(Kind(3, "nvme", nvme_path=nvme_path), 1, 2, {})
    model = wide_model(HIDDEN)
    expected = copy.deepcopy(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3))
    peer = torch.optim.AdamW(expected.parameters(), lr=1e-3, eps=1e-3)
    assert model.optimizer._swappable_optimizer_subgroup(0), "nothing is swapped"
    for _ in range(3):
        accelerator.backward(wide_loss(model, HIDDEN, accelerator.process_index))
        (sum(wide_loss(expected, HIDDEN, rank) for rank in range(2)) / 2).backward()  # type: ignore[union-attr]
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            gradient = safe_get_full_grad(parameter)
            torch.testing.assert_close(gradient.cpu(), other.grad, rtol=1e-4, atol=1e-8)
            safe_set_full_grad(parameter, gradient.abs() * 2)
            other.grad = other.grad.abs() * 2
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.05)
        torch.testing.assert_close(
            norm.cpu(), torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05), rtol=1e-4, atol=0
        )
        optimizer.step()
        optimizer.zero_grad()
        peer.step()
        peer.zero_grad()
    weights = full_weights(model)
    accelerator.free_memory()
    return max(float((weights[name].cpu() - other.detach()).abs().max()) for name, other in expected.named_parameters())


def test_gradients_on_nvme_are_read_edited_and_clipped(ranks: RankPool, tmp_path: Path) -> None:
    assert max(ranks.run(edited_on_nvme, nvme_path=str(tmp_path))) < 2e-6
