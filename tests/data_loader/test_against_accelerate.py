"""Loaders and metrics of two real ranks, beside those of the installed Accelerate in the same processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler

from tests.data_loader.sources import Numbers, SizedStream, Stream
from tests.distributed.pool import RankPool
from zeroaccel import data_loader as ours
from zeroaccel.distributed.operations import gather_for_metrics
from zeroaccel.state import GradientState, PartialState

PLACED: dict[str, Any] = {"put_on_device": True}
DISPATCH = {**PLACED, "dispatch_batches": True}


def shuffled(length: int, size: int, drop_last: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(11)
    return DataLoader(Numbers(length), size, shuffle=True, drop_last=drop_last, generator=generator)


def sampled(length: int, size: int, drop_last: bool) -> DataLoader[Any]:
    sampler = SubsetRandomSampler(range(length), generator=torch.Generator().manual_seed(11))
    return DataLoader(Numbers(length), batch_sampler=BatchSampler(sampler, size, drop_last))


def simple(dataset: Callable[[int], Any]) -> Callable[[int, int, bool], DataLoader[Any]]:
    return lambda length, size, drop_last: DataLoader(dataset(length), size, drop_last=drop_last)


# Name -> (loader of (length, batch size, drop_last), options of prepare_data_loader).
SAME: dict[str, tuple[Callable[[int, int, bool], DataLoader[Any]], dict[str, Any]]] = {
    "in order": (simple(Numbers), PLACED),
    "split": (simple(Numbers), {**PLACED, "split_batches": True}),
    "shuffled": (shuffled, {**PLACED, "rng_types": ["generator"]}),
    "shuffled by a seed": (shuffled, {**PLACED, "use_seedable_sampler": True, "data_seed": 3}),
    "batch sampler": (sampled, {**PLACED, "rng_types": ["generator"]}),
    "stream": (simple(Stream), {**PLACED, "dispatch_batches": False}),
    "dispatched": (simple(Numbers), DISPATCH),
    "dispatched, split": (simple(Numbers), {**DISPATCH, "split_batches": True}),
    "dispatched by a seed": (shuffled, {**DISPATCH, "use_seedable_sampler": True, "data_seed": 3}),
    "dispatched stream": (simple(Stream), PLACED),
    "dispatched sized stream, split": (simple(SizedStream), {**PLACED, "split_batches": True}),
}

# Metrics that differ on purpose (docs/differences.md: metrics-drop-last, remainder).
OTHER_METRICS = {("batch sampler", True), "stream"}


def accelerates(loader: DataLoader[Any], options: dict[str, Any]) -> tuple[list[Any], int]:
    """Batches and metrics of an epoch, and the number of ranks."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import accelerate
    import accelerate.data_loader as theirs

    accelerator = accelerate.Accelerator(cpu=True)
    made = theirs.prepare_data_loader(loader, accelerator.device, **options)
    seen = [(batch.tolist(), accelerator.gather_for_metrics(batch).tolist()) for batch in made]
    return seen, accelerator.num_processes


def beside(name: str) -> list[str]:
    make, options = SAME[name]
    differing = []
    for length, size, drop_last in product((1, 2, 3, 5, 8, 13), (1, 2, 4), (False, True)):
        if drop_last and length < 2 * size and "dispatched" in name:
            continue  # nothing is left, which Accelerate's dispatcher cannot say
        size = 2 * size if options.get("split_batches") else size
        state = PartialState()
        loader = ours.prepare_data_loader(make(length, size, drop_last), state.device, **copy.deepcopy(options))
        found = [(batch.tolist(), gather_for_metrics(batch, GradientState()).tolist()) for batch in loader]
        expected, ranks = accelerates(make(length, size, drop_last), copy.deepcopy(options))
        assert ranks == state.num_processes == 2
        if (name, drop_last) in OTHER_METRICS or name in OTHER_METRICS:
            found, expected = ([batch for batch, _ in seen] for seen in (found, expected))
        if found != expected:
            differing.append(f"{length}, {size}, {drop_last}: {found} instead of {expected}")
    return differing


@pytest.mark.parametrize("name", SAME)
def test_batches_and_metrics_are_those_of_accelerate(ranks: RankPool, name: str) -> None:
    assert ranks.run(beside, name=name, timeout=60.0) == [[], []]
