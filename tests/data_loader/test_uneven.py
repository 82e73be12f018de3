"""Ranks with different numbers of batches: nothing hangs, gradients are averaged, metrics see no filler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.data_loader.sources import Numbers, Stream, read
from tests.distributed.pool import RankPool
from tests.parity.problem import full_weights
from zeroaccel.state import PartialState

BATCH, FEATURES = 2, 6
STAGES = [0, 1, 2, 3]
Batch = dict[str, torch.Tensor]


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def sample(number: int) -> Batch:
    x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(number))
    return {"x": x, "y": x.sum().sin()[None]}


class Samples(Dataset[Batch]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return sample(index)


class OwnSamples(IterableDataset[Batch]):
    """A rank's own source, of which its loader keeps the rank's part of each pair of batches."""

    def __init__(self, batches: int) -> None:
        self.length = 2 * BATCH * batches

    def __iter__(self) -> Iterator[Batch]:
        yield from (sample(index) for index in range(self.length))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def accelerator(stage: int, steps: int = 1, **loaders: Any) -> Any:
    from zeroaccel import Accelerator, DataLoaderConfiguration, DeepSpeedPlugin

    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=steps,
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage),
        dataloader_config=DataLoaderConfiguration(**loaders),
    )


def prepared(stage: int, loader: Any, steps: int = 1, **loaders: Any) -> tuple[Any, ...]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = accelerator(stage, steps, **loaders)
    return run, *run.prepare(model, optimizer, loader)


# --- training -----------------------------------------------------------------------------------------------------


def accumulating(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in loader:
        with run.accumulate(model):
            run.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()


def counted(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """An ordinary loop, whose body takes its batch apart."""
    for batch in loader:
        y = batch.pop("y")
        run.backward((model(batch.pop("x")) - y).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def changing(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """Its body changes the batch in place, and clips."""
    for batch in loader:
        batch["x"].mul_(2)
        run.backward((model(batch["x"] / 2) - batch["y"]).square().mean())
        run.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()


def torch_backward(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in loader:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def native(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in loader:
        model.backward(loss_of(model, batch))
        model.step()


def weighted(run: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """The mean over all samples, of whatever rank."""
    for batch in loader:
        with run.accumulate(model):
            run.backward(loss_of(model, batch), weight=len(batch["x"]))
            optimizer.step()
            optimizer.zero_grad()


def expected_weights(batches: list[list[int]], steps: int, by_sample: bool) -> dict[str, torch.Tensor]:
    """What plain PyTorch arrives at.

    Args:
        batches: of each round, the first sample of each rank's batch.
        steps: rounds of an optimizer step.
        by_sample: the mean over samples, instead of over ranks.
    """
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for start in range(0, len(batches), steps):
        window = batches[start : start + steps]
        count = sum(map(len, window)) if by_sample else 2 * len(window)
        for first in (first for each in window for first in each):
            samples = [sample(first + number) for number in range(BATCH)]
            batch = {name: torch.stack([one[name] for one in samples]) for name in ("x", "y")}
            (loss_of(model, batch) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


LOOPS: dict[str, tuple[Callable[..., None], int]] = {
    "accumulate()": (accumulating, 3),
    "counted": (counted, 1),
    "counted to 2": (counted, 2),
    "in place, clipped": (changing, 1),
    "weighted": (weighted, 3),
    "loss.backward()": (torch_backward, 1),
    "engine.backward()": (native, 1),
}


def train(stage: int, loop: str, lengths: list[int]) -> None:
    function, steps = LOOPS[loop]
    rank = PartialState().process_index
    loader = DataLoader(OwnSamples(lengths[rank]), BATCH)
    run, model, optimizer, loader = prepared(stage, loader, steps, dispatch_batches=False)
    function(run, model, optimizer, loader)
    rounds = range(max(lengths))
    batches = [[2 * BATCH * each + BATCH * r for r in (0, 1) if each < lengths[r]] for each in rounds]
    weights = full_weights(model)
    for name, expected in expected_weights(batches, steps, by_sample=loop == "weighted").items():
        torch.testing.assert_close(weights[name], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_after_4_against_8_batches_are_those_of_the_mean_over_all_ranks(
    ranks: RankPool, stage: int, loop: str
) -> None:
    if stage == 0 and loop == "loss.backward()":
        pytest.skip("an error at stage 0")
    ranks.run(train, stage=stage, loop=loop, lengths=[8, 4])


@pytest.mark.parametrize("lengths", [[1, 3], [0, 2], [2, 1]])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_may_run_out_at_once(ranks: RankPool, stage: int, lengths: list[int]) -> None:
    ranks.run(train, stage=stage, loop="accumulate()", lengths=lengths)


def seen_by_the_body() -> list[tuple[float, bool, bool, int]]:
    run, model, optimizer, loader = prepared(2, DataLoader(Samples(11), BATCH), even_batches=False)
    found = []
    for _ in range(2):
        for batch in loader:
            state = run.gradient_state
            position = loader.state_dict()["batches"]
            found.append((float(batch["x"][0, 0]), state.filler, state.end_of_dataloader, position))
            run.backward(loss_of(model, batch))
            optimizer.step()
    return found


def test_the_body_can_tell_fillers_and_the_end_is_that_of_the_last_rank(ranks: RankPool) -> None:
    first, second = ([float(sample(index)["x"][0]) for index in (start, start + 4, start + 8)] for start in (0, 2))
    expected = [
        [(first[0], False, False, 1), (first[1], False, False, 2), (first[2], False, True, 3)] * 2,
        [(second[0], False, False, 1), (second[1], False, False, 2), (second[2], False, True, 3)] * 2,
    ]
    assert ranks.run(seen_by_the_body) == expected


def resumed() -> list[tuple[float, bool]]:
    rank = PartialState().process_index

    def loader_of(run: Any) -> Any:
        return run.prepare(DataLoader(OwnSamples([8, 4][rank]), BATCH))

    run, model, optimizer, loader = prepared(
        2, DataLoader(OwnSamples([8, 4][rank]), BATCH), dispatch_batches=False, use_stateful_dataloader=True
    )
    state = None
    for number, batch in enumerate(loader, 1):
        run.backward(loss_of(model, batch))
        optimizer.step()
        if number == 6:
            state = loader.state_dict()
    again = loader_of(run)
    again.load_state_dict(state)
    return [(float(batch["x"][0, 0]), run.gradient_state.filler) for batch in again]


def test_an_epoch_goes_on_behind_the_end_of_a_rank(ranks: RankPool) -> None:
    first, second = ranks.run(resumed)
    assert first == [(float(sample(2 * BATCH * each)["x"][0]), False) for each in (6, 7)]
    assert [filler for _, filler in second] == [True, True]


# --- metrics ------------------------------------------------------------------------------------------------------


def metrics(stage: int, length: int, options: dict[str, Any]) -> None:
    dataset = TensorDataset(torch.arange(float(length)))
    run, model, _, loader = prepared(stage, DataLoader(dataset, BATCH), **options)
    model.eval()
    tensors: list[float] = []
    objects: list[str] = []
    with torch.no_grad():
        for (numbers,) in loader:
            outputs = model(numbers[:, None].expand(-1, FEATURES))
            assert len(outputs) == len(numbers)
            tensors += run.gather_for_metrics({"n": numbers})["n"].tolist()
            objects += run.gather_for_metrics([str(number) for number in numbers.tolist()])
    assert tensors == sorted(tensors) == list(range(length))
    assert [float(text) for text in objects] == tensors


@pytest.mark.parametrize("options", [{"even_batches": False}, {"even_batches": False, "split_batches": True}])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_metrics_see_every_sample_once(ranks: RankPool, stage: int, options: dict[str, Any]) -> None:
    for length in (4, 5, 6, 7, 9, 11):
        ranks.run(metrics, stage=stage, length=length, options=options)


def local_reading(stage: int, train: bool) -> tuple[list[list[int]], list[bool]]:
    run, model, *_ = prepared(stage, DataLoader(Samples(4), BATCH))
    model.train(train)
    loader = run.prepare(DataLoader(Numbers(9), BATCH))
    loader.batch_sampler.even_batches = False
    fillers, found = [], []
    for batch in loader:
        found.append(batch.tolist())
        fillers.append(run.gradient_state.filler)
    return found, fillers


def test_a_loop_that_asks_other_ranks_nothing_gets_no_filler(ranks: RankPool) -> None:
    mine = [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]]
    expected = [(batches, [False] * len(batches)) for batches in mine]
    assert ranks.run(local_reading, stage=2, train=False) == expected
    with_fillers = [(mine[0], [False] * 3), ([*mine[1], [6, 7]], [False, False, True])]
    assert ranks.run(local_reading, stage=2, train=True) == with_fillers
    assert ranks.run(local_reading, stage=3, train=False) == with_fillers


# --- what it costs, and what cannot work --------------------------------------------------------------------------


def exchanges_of_an_even_loader() -> int:
    run, *_, loader = prepared(2, DataLoader(Samples(12), BATCH), use_seedable_sampler=True)
    group: Any = dist.distributed_c10d._get_default_group()
    run.rng_types.clear()
    loader.rng_types = None
    before = group._get_sequence_number_for_group()
    assert len(list(loader)) == 3
    return int(group._get_sequence_number_for_group() - before)


def test_evenly_sharded_loaders_ask_the_other_ranks_nothing(ranks: RankPool) -> None:
    assert ranks.run(exchanges_of_an_even_loader) == [0, 0]


def left_at_different_batches() -> str:
    run, *_, loader = prepared(2, DataLoader(Samples(24), BATCH), even_batches=False)
    try:
        for _ in range(3):
            for number, _batch in enumerate(loader):
                if number == 2 * run.process_index:
                    break
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_ranks_that_leave_a_loop_at_different_batches_are_told(ranks: RankPool) -> None:
    try:
        found = ranks.run(left_at_different_batches, timeout=60)
    finally:
        ranks.close()
    assert any("DistributedError: the ranks are not at the same batch" in text for text in found)


def joining() -> list[Any]:
    run = accelerator(2)
    loader, _ = run.prepare(DataLoader(Numbers(5), BATCH), DataLoader(Stream(4), BATCH))
    found: list[Any] = [len(loader)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with run.join_uneven_inputs([], even_batches=False):
            found += [len(loader), read(loader)]
        found += [[(Path(one.filename).name, str(one.message)) for one in caught], len(loader)]
        caught.clear()
        with run.join_uneven_inputs([]):
            found.append(len(loader))
        found.append(len(caught))
    return found


def test_joining_overrides_even_batches_within_its_block(ranks: RankPool) -> None:
    text = "even_batches=False is for map-style loaders that are not dispatched: it leaves 1 of the 2 prepared loaders"
    found = ranks.run(joining)
    assert [each[:3] for each in found] == [[2, 2, [[0, 1], [4]]], [2, 1, [[2, 3]]]]
    told = [("test_uneven.py", f"{text} as they are")]  # it points at the script's line
    assert all(each[3] == told and each[4:] == [2, 2, 0] for each in found)
