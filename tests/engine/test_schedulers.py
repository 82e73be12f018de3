"""The learning rate of every real step, for each way of bringing a scheduler, on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from tests.distributed.pool import RankPool
from tests.engine.small import FEATURES, Net, accelerator, loader, net
from zeroaccel.engine.optimizer import DummyOptim
from zeroaccel.engine.scheduler import DummyScheduler

RATE = 0.1


@pytest.fixture(scope="module")
def single() -> Iterator[RankPool]:
    """One rank."""
    pool = RankPool(1)
    yield pool
    pool.close()


def run(prepared: Any, model: Any, optimizer: Any, scheduler: Any, steps: int, bad: tuple[int, ...] = ()) -> list[Any]:
    """Trains; the learning rates of all groups that each step used, or None for a skipped one.

    Args:
        bad: steps whose loss is infinite.
    """
    rates: list[Any] = []
    x = torch.ones(2, FEATURES)
    for step in range(steps):
        used = model.get_lr()
        assert used == [group["lr"] for group in optimizer.param_groups]
        prepared.backward(model(x).float().mean() * (float("inf") if step in bad else 1.0))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append(None if optimizer.step_was_skipped else used)
    assert scheduler.get_last_lr() == model.get_lr()
    return rates


# --- PyTorch's schedulers -------------------------------------------------------------------------------------------


def warm_up(optimizer: Any) -> Any:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 8), CosineAnnealingLR(optimizer, 24)], milestones=[8])


def chained(optimizer: Any) -> Any:
    return ChainedScheduler([LinearLR(optimizer, 0.1, 1.0, 8), ConstantLR(optimizer, 0.5, 4)], optimizer)


TORCH: dict[str, Callable[[Any], Any]] = {
    "linear warm-up and decay": lambda o: LambdaLR(o, lambda s: min((s + 1) / 6, max(0.0, (40 - s) / 34))),
    "one cycle, its end passed": lambda o: OneCycleLR(o, max_lr=[RATE, RATE / 2], total_steps=17, cycle_momentum=True),
    "sequence": warm_up,
    "chain": chained,
}


def groups(model: Net) -> list[dict[str, Any]]:
    return [{"params": model.first.parameters()}, {"params": model.last.parameters(), "lr": RATE / 2}]


def plain_rates(make: Callable[[Any], Any], steps: int, every: int) -> list[list[float]]:
    """What PyTorch uses in one process at each `every`-th of its steps; at the scheduler's end it stays."""
    optimizer = AdamW(groups(net()), lr=RATE)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps * every):
        if step % every == 0:
            rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if getattr(scheduler, "total_steps", step + 1) > step:  # OneCycleLR raises beyond
            scheduler.step()
    return rates


def torch_rates(name: str, offload: str, split: bool, stage: int) -> list[Any]:
    prepared = accelerator(options={"split_batches": split}, zero_stage=stage, offload_optimizer_device=offload)
    model = net()
    optimizer = AdamW(groups(model), lr=RATE)
    objects = prepared.prepare(model, optimizer, TORCH[name](optimizer), loader())
    rates = run(prepared, *objects[:3], steps=12)
    prepared.free_memory()
    return rates


@pytest.mark.parametrize("name", TORCH)
def test_a_scheduler_follows_the_samples_whatever_the_number_of_ranks(
    name: str, ranks: RankPool, single: RankPool
) -> None:
    runs = [(single, "none", False), (ranks, "none", False), (ranks, "none", True)]
    if name in ("one cycle, its end passed", "sequence"):  # CPU Adam takes a second to make
        runs.append((ranks, "cpu", False))
    for pool, offload, split in runs:
        every = 1 if split else pool.world_size
        expected = plain_rates(TORCH[name], steps=12, every=every)
        for rates in pool.run(torch_rates, name=name, offload=offload, split=split, stage=2):
            for used, right in zip(rates, expected, strict=True):
                assert used == pytest.approx(right), f"{pool.world_size} ranks, offload {offload}, split {split}"


def at_every_call() -> None:
    """step_scheduler_with_optimizer=False, and accumulation with and without it."""
    for with_optimizer, expected in ((False, [1, 2, 3, 4]), (True, [0, 2, 2, 4])):
        options = {"step_scheduler_with_optimizer": with_optimizer, "gradient_accumulation_steps": 2}
        prepared = accelerator(options=options, zero_stage=2)
        model = net()
        optimizer = SGD(model.parameters(), lr=RATE)
        torch_scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        model, optimizer, scheduler, batches = prepared.prepare(model, optimizer, torch_scheduler, loader(8))
        seen = []
        for (x,) in batches:
            with prepared.accumulate(model):
                prepared.backward(model(x).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen.append(torch_scheduler.last_epoch)
            assert model.get_lr() == [pytest.approx(RATE / (torch_scheduler.last_epoch + 1))]
        assert seen == expected
        prepared.free_memory()


def plateau() -> None:
    prepared = accelerator(zero_stage=3)
    model = net()
    optimizer = AdamW(model.parameters(), lr=RATE)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    model, optimizer, scheduler, _ = prepared.prepare(model, optimizer, scheduler, loader())
    for _ in range(2):
        prepared.backward(model(torch.ones(2, FEATURES)).mean())
        optimizer.step()
        scheduler.step(1.0)  # twice on two ranks, so that the patience is over
    assert model.get_lr() == [RATE / 2]
    prepared.free_memory()


def overflow() -> None:
    """A skipped step advances neither PyTorch's schedulers nor DeepSpeed's."""
    fp16 = {"enabled": True, "auto_cast": True, "initial_scale_power": 4, "hysteresis": 1}
    for stage, of_deepspeed in ((0, False), (2, False), (2, True), (3, False)):
        config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "fp16": fp16}
        if of_deepspeed:
            params = {"warmup_max_lr": RATE, "warmup_num_steps": 10, "warmup_type": "linear"}
            config["scheduler"] = {"type": "WarmupLR", "params": params}
        prepared = accelerator(config)
        model = net()
        optimizer = SGD(model.parameters(), lr=RATE)
        made: Any = DummyScheduler(optimizer) if of_deepspeed else LambdaLR(optimizer, lambda step: 1 / (step + 1))
        model, optimizer, scheduler, _ = prepared.prepare(model, optimizer, made, loader())
        rates = run(prepared, model, optimizer, scheduler, steps=6, bad=(1, 3))
        used = [rate[0] for rate in rates if rate is not None]
        assert [step for step, rate in enumerate(rates) if rate is None] == [1, 3]
        expected = [0, 0, 0.1, 0.2] if of_deepspeed else [1, 1 / 3, 1 / 5, 1 / 7]
        assert used == pytest.approx([RATE * share for share in expected])
        prepared.free_memory()


def warnings_of_torch() -> None:
    """No complaint of PyTorch about the order of steps, though DeepSpeed's CPU optimizer does the work."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch_rates("sequence", "cpu", False, 2)
    # The class is left as it was.
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    assert not hasattr(DeepSpeedCPUAdam.step, "_wrapped_by_lr_sched")


@pytest.mark.parametrize("function", [at_every_call, plateau, overflow, warnings_of_torch], ids=lambda f: f.__name__)
def test_pytorch_scheduler(function: Callable[[], None], ranks: RankPool) -> None:
    ranks.run(function)


# --- DeepSpeed's schedulers -----------------------------------------------------------------------------------------


@dataclass
class Own:
    """One of DeepSpeed's schedulers.

    Attributes:
        params: of the config, "auto" where `dummy` says.
        dummy: arguments of the `DummyScheduler`, as the script counts: in steps of one process.
        resolved: what the `auto` ones become, by world size.
    """

    params: dict[str, Any]
    dummy: dict[str, Any] = field(default_factory=dict)
    resolved: Callable[[int], dict[str, Any]] = lambda world_size: {}


OWN = {
    "WarmupLR": Own(
        {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
        {"warmup_num_steps": 8},
        lambda ranks: {"warmup_min_lr": 0, "warmup_max_lr": RATE, "warmup_num_steps": 8 // ranks},
    ),
    "WarmupDecayLR": Own(
        {"warmup_min_lr": 0.01, "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
         "warmup_type": "linear"},
        {"warmup_num_steps": 8, "total_num_steps": 20},
        lambda ranks: {"warmup_max_lr": RATE, "warmup_num_steps": 8 // ranks, "total_num_steps": 20 // ranks},
    ),
    "WarmupCosineLR": Own(
        {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_type": "linear"},
        {"warmup_num_steps": 8, "total_num_steps": 20},
        lambda ranks: {"warmup_num_steps": 8 // ranks, "total_num_steps": 20 // ranks},
    ),
    "OneCycle": Own(
        {"cycle_min_lr": 0.01, "cycle_max_lr": "auto", "cycle_first_step_size": 4},
        {"cycle_max_lr": 0.2},
        lambda ranks: {"cycle_max_lr": 0.2},
    ),
    "LRRangeTest": Own({"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0}),
}  # fmt: skip


def resolved_params(name: str, world_size: int) -> dict[str, Any]:
    return {**OWN[name].params, **OWN[name].resolved(world_size)}


def reference_rates(name: str, world_size: int) -> list[Any]:
    """DeepSpeed's scheduler on a PyTorch optimizer, stepped once a step."""
    from deepspeed.runtime import lr_schedules

    optimizer = AdamW(net().parameters(), lr=RATE)
    scheduler = getattr(lr_schedules, name)(optimizer, **resolved_params(name, world_size))
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    return rates


def own_rates(name: str, way: str, offload: str) -> list[Any]:
    """Rates of the engine.

    Args:
        way: "config" (cases a and c of the guide: with DummyOptim and with a real one), "object" or "callable".
    """
    from deepspeed.runtime import lr_schedules

    from zeroaccel.engine.scheduler import DeepSpeedSchedulerWrapper
    from zeroaccel.state import PartialState

    def make(optimizer: Any) -> Any:
        params = resolved_params(name, PartialState().num_processes)
        return getattr(lr_schedules, name)(optimizer, **params)

    zero = {"stage": 2, "offload_optimizer": {"device": offload}}
    config: dict[str, Any] = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 4}
    if way.startswith("config"):
        config["scheduler"] = {"type": name, "params": OWN[name].params}
    if way.endswith("dummy"):
        config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    prepared = accelerator(config)
    model = net()
    optimizer: Any = (DummyOptim if way.endswith("dummy") else AdamW)(model.parameters(), lr=RATE)
    if way.startswith("config"):
        scheduler: Any = DummyScheduler(optimizer, **OWN[name].dummy)
    else:
        scheduler = make(optimizer) if way == "object" else DummyScheduler(optimizer, lr_scheduler_callable=make)
    scheduler, optimizer, model = prepared.prepare(scheduler, optimizer, model)
    assert isinstance(scheduler, DeepSpeedSchedulerWrapper)
    assert type(scheduler.scheduler).__name__ == name
    rates = run(prepared, model, optimizer, scheduler, steps=12)
    prepared.free_memory()
    return rates


WAYS = ("config", "object", "config dummy", "callable", "callable dummy")


@pytest.mark.parametrize("name", OWN)
def test_deepspeeds_scheduler_steps_once_a_step(name: str, ranks: RankPool, single: RankPool) -> None:
    for pool in (single, ranks):
        expected = reference_rates(name, pool.world_size)
        assert len({rates[0] for rates in expected}) > 2
        for way in WAYS[:1] if pool is single else WAYS if name in ("WarmupDecayLR", "OneCycle") else WAYS[:2]:
            offload = "cpu" if name == "OneCycle" and way in ("object", "callable") else "none"
            for rates in pool.run(own_rates, name=name, way=way, offload=offload):
                assert rates == [pytest.approx(right) for right in expected], f"{way}, {offload}"


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_the_curve_over_the_samples_is_that_of_one_rank_and_peaks_where_the_script_put_it(
    name: str, ranks: RankPool, single: RankPool
) -> None:
    curves = []
    for pool in (single, ranks):
        for rates in pool.run(own_rates, name=name, way="config", offload="none"):
            flat = [rate[0] for rate in rates]
            # DeepSpeed's schedulers begin with one step at the lowest rate.
            peak = flat.index(max(flat)) - 1
            assert max(flat) > 0.9 * RATE
            assert peak * pool.world_size == OWN[name].dummy["warmup_num_steps"]
            curves.append(flat[1:])
    alone, *together = curves
    warmup = OWN[name].dummy["warmup_num_steps"]
    for curve in together:
        for step, rate in enumerate(curve[: len(alone) // 2]):
            # As many samples, the same rate; DeepSpeed's cosine takes the end of a step for its place.
            place = 2 * step + (name == "WarmupCosineLR" and 2 * step >= warmup)
            assert rate == pytest.approx(alone[place]), step


def torch_callable() -> None:
    """A scheduler of the script's own on DeepSpeed's optimizer (case d), stepped once a step."""
    from zeroaccel.engine.scheduler import DeepSpeedSchedulerWrapper

    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2,
              "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}  # fmt: skip
    prepared = accelerator(config)
    model = net()
    optimizer = DummyOptim(model.parameters(), lr=RATE)
    dummy = DummyScheduler(optimizer, lr_scheduler_callable=lambda own: LambdaLR(own, lambda step: 1 / (step + 1)))
    model, optimizer, scheduler = prepared.prepare(model, optimizer, dummy)
    assert isinstance(scheduler, DeepSpeedSchedulerWrapper)
    assert run(prepared, model, optimizer, scheduler, steps=3) == [[pytest.approx(RATE / n)] for n in (1, 2, 3)]
    prepared.free_memory()


def test_a_scheduler_made_by_a_callable_steps_once_a_step(ranks: RankPool) -> None:
    ranks.run(torch_callable)


# --- errors of the four cases ---------------------------------------------------------------------------------------

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": RATE}}}
DECAY = {"scheduler": {"type": "WarmupLR", "params": {}}}

# config, whether the optimizer is a dummy, the scheduler ("torch", "dummy" or none), what the error must say
REFUSED: dict[str, tuple[dict[str, Any], bool, str, list[str]]] = {
    "optimizer twice": (ADAM, False, "", ["optimizer section and the code a SGD", "DummyOptim"]),
    "dummy optimizer without config": ({}, True, "", ["DummyOptim", "no optimizer section", "add one"]),
    "scheduler twice": (DECAY, False, "torch", ["scheduler section and the code a LinearLR", "DummyScheduler"]),
    "dummy scheduler without config": ({}, False, "dummy", ["DummyScheduler", "no scheduler section", "callable"]),
    "dummy optimizer, real scheduler": (ADAM, True, "torch", ["DummyOptim and a LinearLR", "lr_scheduler_callable"]),
    "all at once": ({**ADAM, **DECAY}, False, "torch", ["2 problems", "1. ", "a SGD", "2. ", "a LinearLR"]),
}


def refusal(name: str) -> str:
    config, dummy, kind, _ = REFUSED[name]
    prepared = accelerator({"zero_optimization": {"stage": 2}, **config})
    model = net()
    optimizer: Any = (DummyOptim if dummy else SGD)(model.parameters(), lr=RATE)
    objects = [model, optimizer, loader()]
    if kind == "dummy":
        objects.append(DummyScheduler(optimizer))
    elif kind == "torch":
        scheduler = LinearLR(SGD(net().parameters(), lr=RATE))
        scheduler.optimizer = optimizer
        objects.append(scheduler)
    with pytest.raises(ValueError) as caught:
        prepared.prepare(*objects)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_config_and_code_that_do_not_fit_are_refused(name: str, ranks: RankPool) -> None:
    for text in ranks.run(refusal, name=name):
        for part in REFUSED[name][3]:
            assert part in text
