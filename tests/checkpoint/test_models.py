"""Several models, models without an optimizer, every scheduler: all in one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.checkpoint.resume import Run, Training
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint.safe_values import from_safe, to_safe


def make(seed: int, stage: int) -> tuple[Any, Any, Any]:
    """A trained and a frozen model, each an engine of its own."""
    from tests.engine.small import Net, accelerator

    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    made = accelerator(config)
    torch.manual_seed(seed)
    first, second = Net(), Net()
    teacher = nn.BatchNorm1d(8)
    teacher.running_mean = torch.randn(8)  # type: ignore[assignment]
    one, optimizer = made.prepare(first, torch.optim.AdamW(first.parameters(), lr=1e-2))
    two, other = made.prepare(second, torch.optim.SGD(second.parameters(), lr=1e-2, momentum=0.9))
    if stage in (0, 3):  # the others shard nothing but optimizers
        teacher = made.prepare(teacher.eval())
    return made, (one, two, teacher), (optimizer, other)


def train(made: Any, models: Any, optimizers: Any, steps: int) -> list[float]:
    """A GAN's loop, more or less."""
    one, two, teacher = models
    losses = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            seen = teacher(x)
        loss = (one(seen) - two(x)).pow(2).mean()
        made.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save_and_load(folder: str, stage: int) -> tuple[list[float], list[float]]:
    made, models, optimizers = make(1, stage)
    train(made, models, optimizers, 2)
    made.save_state(folder)
    shown = train(made, models, optimizers, 3)
    made.free_memory()
    made, models, optimizers = make(2, stage)
    made.load_state(folder)
    again = train(made, models, optimizers, 3)
    made.free_memory()
    return shown, again


@pytest.mark.parametrize("stage", [0, 3])
def test_several_models_and_one_without_an_optimizer(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    for shown, again in ranks.run(save_and_load, folder=str(tmp_path), stage=stage):
        assert shown == again


SCHEDULERS: list[Any] = [
    lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=20),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.5**step]),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)]),
]


@pytest.mark.parametrize("number", range(len(SCHEDULERS)))
def test_every_scheduler_survives_being_made_safe(number: int) -> None:
    def steps(count: int, state: Any = None) -> tuple[list[list[float]], Any, Any]:
        tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [tensors[0]]}, {"params": [tensors[1]], "lr": 0.3}], lr=0.1)
        scheduler = SCHEDULERS[number](optimizer)
        if state is not None:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(from_safe(to_safe(state[1], "scheduler")))
        shown = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            shown.append([float(group["lr"]) for group in optimizer.param_groups])
        return shown, optimizer.state_dict(), scheduler.state_dict()

    whole, _, _ = steps(8)
    begin, *state = steps(3)
    assert begin + steps(5, state)[0] == whole


def deepspeeds_scheduler(folder: str) -> tuple[list[Any], list[Any]]:
    """Rates that optimizer and scheduler show behind a save, of the run that saved and of one that loads."""
    from tests.engine.small import Net, accelerator
    from zeroaccel.utils import DummyScheduler

    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 9}}
    shown: tuple[list[Any], list[Any]] = ([], [])
    for rates in shown:
        made = accelerator(
            {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "scheduler": schedule}
        )
        model = Net()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, scheduler = made.prepare(model, optimizer, DummyScheduler(optimizer))
        made.register_for_checkpointing(scheduler)  # as scripts do, though it is kept anyway
        for step in range(6):
            if step < 3 and rates is shown[1]:
                continue
            if step == 3:
                made.save_state(folder) if rates is shown[0] else made.load_state(folder)
                rates.append([scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]])
            made.backward(model(torch.ones(4, 8)).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step >= 3:
                rates.append([scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]])
        made.free_memory()
    return shown


def test_a_scheduler_of_deepspeeds_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    for whole, resumed in ranks.run(deepspeeds_scheduler, folder=str(tmp_path)):
        assert whole == resumed
        assert len({rate for _, rate in whole}) == 4


def test_loading_sets_what_the_script_holds(tmp_path: Path) -> None:
    """Groups are changed in place: a scheduler or a script that holds one sees the loaded rate."""
    training = Training(Run(None, 1))
    training.train(2)
    training.accelerator.save_state(tmp_path)
    group = training.optimizer.param_groups[0]
    training.train(2)
    rate = group["lr"]
    training.accelerator.load_state(tmp_path)
    assert group is training.optimizer.param_groups[0]
    assert group["lr"] > rate


def epoch_from_the_third_batch(folder: str, resumed: bool, by_itself: bool) -> tuple[list[int], list[float]]:
    """Ids of an epoch's batches behind the third, and what a dropout drew, of a run that saved there or that loads."""
    from torch.utils.data import DataLoader

    from zeroaccel.utils import DataLoaderConfiguration

    training = Training(Run(2), dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=by_itself))
    accelerator = training.accelerator
    torch.manual_seed(7 if resumed else 8)
    loader = accelerator.prepare(DataLoader(list(range(40)), batch_size=2, shuffle=True))
    ids: list[int] = []
    drawn: list[float] = []
    if resumed:
        accelerator.load_state(folder)
        loader = loader if by_itself else accelerator.skip_first_batches(loader, 3)
    for number, batch in enumerate(loader):
        drop = float(torch.rand(()))
        if resumed or number >= 3:
            ids += batch.tolist()
            drawn.append(drop)
        if not resumed and number == 2:
            accelerator.save_state(folder)
    accelerator.free_memory()
    return ids, drawn


@pytest.mark.parametrize("by_itself", [True, False], ids=["by itself", "by skip_first_batches"])
def test_a_loader_goes_on_in_the_middle_of_its_epoch(ranks: RankPool, tmp_path: Path, by_itself: bool) -> None:
    options = {"folder": str(tmp_path), "by_itself": by_itself}
    whole = ranks.run(epoch_from_the_third_batch, resumed=False, **options)
    assert ranks.run(epoch_from_the_third_batch, resumed=True, **options) == whole
    assert sum(len(ids) for ids, _ in whole) == 28
