"""Several models in one `Accelerator`, each with a plugin of its own. `situations_models.py` holds the loops."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool, reset_states
from tests.engine import situations_models as loops
from tests.engine.loop import Kind
from tests.engine.situations_models import Pair
from tests.engine.small import net, samples

BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
# What both models train on, then what has a teacher as its second model.
SELECTED = [
    *((loops.TRAINED, Pair(Kind(one), Kind(two))) for one, two in ((2, 2), (2, 3), (3, 3), (0, 1))),
    (loops.TRAINED, Pair(Kind(3, **BF16), Kind(2, **FP16))),
    (loops.TRAINED, Pair(Kind(2), Kind(2, **FP16))),
    *((loops.WITH_TEACHER, Pair(Kind(one), Kind(two))) for one, two in ((2, 3), (2, 0), (0, 3))),
    (loops.WITH_TEACHER, Pair(Kind(2, **BF16), Kind(3, **BF16))),
    (loops.WITH_REFERENCE, Pair(Kind(2), Kind(3), (2, 1))),
    (loops.WITH_TEACHER, Pair(Kind(2), Kind(0, **BF16))),
    (loops.ACCUMULATED, Pair(Kind(2), Kind(3), (2, 1))),
    (loops.ACCUMULATED, Pair(Kind(0), Kind(1), (4, 2))),
]
_STAGES = [Kind(stage) for stage in range(4)]
_MIXED = [Kind(3, **BF16), Kind(2, **FP16), Kind(0, **BF16), Kind(2), Kind(1, **BF16), Kind(3, **FP16), Kind(2, "cpu")]
_ALL = [*product(_STAGES, _STAGES), *((a, b) for a, b in product(_MIXED, _MIXED) if a != b)]
FULL = [
    *((loops.TRAINED, Pair(*kinds)) for kinds in _ALL),
    *((loops.WITH_TEACHER, Pair(*kinds)) for kinds in _ALL if kinds[1].stage in (0, 3)),
    *((loops.WITH_REFERENCE, Pair(*kinds, (4, 1))) for kinds in _ALL if kinds[1].stage in (0, 3)),
    *((loops.ACCUMULATED, Pair(*kinds, steps)) for kinds in product(_STAGES, _STAGES) for steps in ((1, 2), (4, 2))),
]

Loops = list[Callable[[Pair], float]]


def run(name: str, pair: Pair) -> str:
    """What is wrong with the loop; nothing if it is right."""
    try:
        getattr(loops, name)(pair)
    except Exception:
        return traceback.format_exc()
    return ""


def check(chosen: Loops, pair: Pair, ranks: RankPool) -> None:
    problems = []
    for loop in chosen:
        found = ranks.run(run, name=loop.__name__, pair=pair)
        problems += [f"{loop.__name__}, rank {rank}:\n{text}" for rank, text in enumerate(found) if text]
    assert not problems, "\n".join(problems)


def name_of(value: Any) -> str:
    lists = ("TRAINED", "WITH_TEACHER", "WITH_REFERENCE", "ACCUMULATED")
    return next((name.lower() for name in lists if getattr(loops, name) is value), str(value))


@pytest.mark.parametrize(("chosen", "pair"), SELECTED, ids=name_of)
def test_weights_are_those_of_plain_pytorch(chosen: Loops, pair: Pair, ranks: RankPool) -> None:
    check(chosen, pair, ranks)


@pytest.mark.full
@pytest.mark.parametrize(("chosen", "pair"), FULL, ids=name_of)
def test_weights_everywhere(chosen: Loops, pair: Pair, ranks: RankPool) -> None:
    check(chosen, pair, ranks)


def test_without_deepspeed_each_model_counts_the_blocks_that_name_it() -> None:
    from zeroaccel import Accelerator

    reset_states()
    plain, inputs = Accelerator(cpu=True, gradient_accumulation_steps=2), samples(8).tensors[0]
    models, peers = [net(), net()], [net(), net()]
    optimizers, others = ([torch.optim.SGD(each.parameters(), lr=0.1) for each in made] for made in (models, peers))
    prepared = plain.prepare(*models, *optimizers)
    for number in range(4):
        for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
            with plain.accumulate(model):
                optimizer.zero_grad()
                plain.backward(model(inputs + number).pow(2).mean())
                optimizer.step()
    for peer, optimizer in zip(peers, others, strict=True):
        for number in range(4):
            (peer(inputs + number).pow(2).mean() / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    for model, peer in zip(models, peers, strict=True):
        for found, wanted in zip(model.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
