"""What scripts import for DeepSpeed's stages: parameters gathered for a while, the CPU version of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool, reset_states
from tests.engine.small import accelerator, loader, net
from zeroaccel.engine.offload import map_pytorch_optim_to_deepspeed
from zeroaccel.engine.zero3 import GatheredParameters
from zeroaccel.errors import ConfigError


def _gather(stage: int, modifier_rank: int | None) -> dict[str, Any]:
    """Sizes of a weight before, inside and after the block, in which every rank writes its own number."""
    running = accelerator(zero_stage=stage)
    model = net()
    prepared, *_ = running.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    weight = prepared.module.first.weight
    sizes = [weight.numel()]
    with GatheredParameters([weight], modifier_rank=modifier_rank):
        sizes.append(weight.numel())
        with torch.no_grad():
            weight.fill_(running.process_index + 1)
    sizes.append(weight.numel())
    with GatheredParameters(weight):
        return {"sizes": sizes, "values": sorted(set(weight.flatten().tolist()))}


def test_stage_3_gathers_parameters_and_spreads_the_changes_of_one_rank(ranks: RankPool) -> None:
    expected = {"sizes": [0, 128, 0], "values": [2.0]}
    assert ranks.run(_gather, stage=3, modifier_rank=1) == [expected, expected]


def test_below_stage_3_parameters_are_whole_and_nothing_is_spread(ranks: RankPool) -> None:
    found = ranks.run(_gather, stage=2, modifier_rank=1)
    assert found == [{"sizes": [128, 128, 128], "values": [rank + 1.0]} for rank in (0, 1)]


def test_without_an_accelerator_nothing_is_gathered() -> None:
    reset_states()
    weight = torch.nn.Parameter(torch.ones(2))
    with GatheredParameters([weight], modifier_rank=0):
        assert weight.numel() == 2


def _map(kind: str, **options: Any) -> tuple[str, dict[str, Any], int]:
    optimizer = getattr(torch.optim, kind)(net().parameters(), **options)
    mapped: Any = map_pytorch_optim_to_deepspeed(optimizer)
    shown = {name: mapped.param_groups[0][name] for name in options}
    return type(mapped).__name__, shown, len(mapped.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("AdamW", {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.125, "weight_decay": 0.5}, "DeepSpeedCPUAdam"),
        ("Adagrad", {"lr": 0.25, "eps": 0.125, "weight_decay": 0.5}, "DeepSpeedCPUAdagrad"),
    ],
)
def test_the_cpu_version_keeps_the_hyper_parameters(
    ranks: RankPool, kind: str, options: dict[str, Any], expected: str
) -> None:
    assert ranks.run(_map, kind=kind, **options) == [(expected, options, 4)] * 2


def test_an_optimizer_without_cpu_version_is_refused_by_name() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="no CPU version of SGD"):
        map_pytorch_optim_to_deepspeed(optimizer)
