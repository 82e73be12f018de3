"""What scripts get wrong: one clear error on every rank, and no rank waits for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.data_loader.sources import Batches, Numbers, Stream
from tests.distributed.pool import RankPool
from tests.engine.small import accelerator, net


def prepared(*loaders: Any, stage: int = 2, **options: Any) -> Any:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator(options=options, zero_stage=stage).prepare(model, optimizer, *loaders)


# Name -> (call with the rank, error, texts in it).
BAD: dict[str, tuple[Callable[[int], Any], str, list[str]]] = {
    "no batch size at all": (
        lambda rank: prepared(DataLoader(Stream(4), batch_size=None)),
        "ConfigError",
        ["train_micro_batch_size_per_gpu", "batch_size"],
    ),
    "a batch sampler without batch size": (
        lambda rank: prepared(DataLoader(Numbers(4), batch_sampler=Batches([[0], [1]]))),
        "ConfigError",
        ["train_micro_batch_size_per_gpu", "batch_size"],
    ),
    "a batch smaller than the world, split": (
        lambda rank: prepared(DataLoader(Numbers(4), batch_size=1), split_batches=True),
        "ConfigError",
        ["batch size is 1", "a multiple of 2", "split_batches=False"],
    ),
    "gather of different shapes": (
        lambda rank: accelerator(zero_stage=0).gather(torch.ones(1 + rank)),
        "DistributedError",
        ["rank 0: [1] torch.float32", "rank 1: [2] torch.float32", "pad_across_processes"],
    ),
    "gather_for_metrics of different shapes": (
        lambda rank: accelerator(zero_stage=0).gather_for_metrics({"x": torch.ones(2, 3 + rank)}),
        "DistributedError",
        ["rank 0: {'x': [2, 3]", "rank 1: {'x': [2, 4]"],
    ),
    "objects that cannot be pickled": (
        lambda rank: accelerator(zero_stage=0).gather_for_metrics([(lambda: rank)] if rank else ["a"]),
        "DistributedError",
        ["an object cannot be pickled", "rank 1: list:"],
    ),
}


def told(name: str) -> str:
    from zeroaccel.state import PartialState

    rank = PartialState().process_index
    try:
        BAD[name][0](rank)
    except Exception as error:
        PartialState().wait_for_everyone()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_on_every_rank(ranks: RankPool, name: str) -> None:
    first, second = ranks.run(told, name=name, timeout=30.0)
    assert first == second
    assert first.startswith(f"{BAD[name][1]}: ")
    for text in BAD[name][2]:
        assert text in first
