"""Optimizer offload to the CPU keeps the user's update rule, hyper-parameters and param groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, RMSprop

from tests.distributed.pool import RankPool
from tests.engine.small import FEATURES, Net, accelerator, loader, net, train_step


class OwnAdamW(AdamW):
    """A class of the user's own, whose rule nobody knows."""


def groups(model: Net, **second: Any) -> list[dict[str, Any]]:
    return [{"params": model.first.parameters(), "tag": "body"}, {"params": model.last.parameters(), **second}]


# What is passed, and the optimizer that must step. Epsilon is large enough that rounding is not amplified.
OPTIMIZERS: dict[str, tuple[Callable[[Net], Any], str]] = {
    "AdamW, groups with their own values": (
        lambda m: AdamW(groups(m, lr=0.02, betas=(0.5, 0.7), eps=0.1, weight_decay=0.5), lr=0.1, eps=0.01),
        "DeepSpeedCPUAdam",
    ),
    "Adam, decoupled": (
        lambda m: Adam(m.parameters(), lr=0.1, eps=0.01, weight_decay=0.3, decoupled_weight_decay=True),
        "DeepSpeedCPUAdam",
    ),
    "Adam, rate as tensor": (
        lambda m: Adam(m.parameters(), lr=torch.tensor(0.1), eps=0.01, weight_decay=0.3),
        "DeepSpeedCPUAdam",
    ),
    "Adagrad": (
        lambda m: Adagrad(groups(m, lr=0.02, eps=0.1), lr=0.1, eps=0.01, weight_decay=0.3),
        "DeepSpeedCPUAdagrad",
    ),
    "Adam, decoupled in one group": (
        lambda m: Adam(groups(m, decoupled_weight_decay=True), lr=0.1, eps=0.01, weight_decay=0.3),
        "Adam",
    ),
    "AdamW, amsgrad": (lambda m: AdamW(m.parameters(), lr=0.1, eps=0.01, amsgrad=True), "AdamW"),
    "AdamW, amsgrad in one group": (lambda m: AdamW(groups(m, amsgrad=True), lr=0.1, eps=0.01), "AdamW"),
    "AdamW, maximize": (lambda m: AdamW(m.parameters(), lr=0.1, eps=0.01, maximize=True), "AdamW"),
    "Adagrad, decaying": (lambda m: Adagrad(m.parameters(), lr=0.1, lr_decay=0.5, eps=0.01), "Adagrad"),
    "Adagrad, started": (
        lambda m: Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.5, eps=0.01),
        "Adagrad",
    ),
    "SGD": (lambda m: SGD(groups(m, lr=0.02, momentum=0.5), lr=0.1, momentum=0.9, nesterov=True), "SGD"),
    "RMSprop": (lambda m: RMSprop(m.parameters(), lr=0.01, eps=0.01), "RMSprop"),
    "NAdam": (lambda m: NAdam(m.parameters(), lr=0.01, eps=0.01), "NAdam"),
    "a class of the user's": (lambda m: OwnAdamW(m.parameters(), lr=0.1, eps=0.01), "OwnAdamW"),
}
HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "tag")


def batch() -> torch.Tensor:
    return torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(9))


def train(name: str, stage: int) -> list[torch.Tensor]:
    import deepspeed

    make, expected = OPTIMIZERS[name]
    prepared = accelerator(zero_stage=stage, offload_optimizer_device="cpu")
    model = net()
    optimizer = make(model)
    given = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in optimizer.param_groups]
    engine, sharded, _ = prepared.prepare(model, optimizer, loader())
    assert type(engine.basic_optimizer).__name__ == expected
    assert engine.basic_optimizer.param_groups is sharded.param_groups
    for before, after in zip(given, sharded.param_groups, strict=True):
        assert {key: after[key] for key in before} == before
    for _ in range(4):
        train_step(prepared, engine, sharded, batch())
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        weights = [parameter.detach().clone() for parameter in parameters]
    prepared.free_memory()
    return weights


def plain(name: str) -> list[torch.Tensor]:
    model = net()
    optimizer = OPTIMIZERS[name][0](model)
    for _ in range(4):
        model(batch()).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rule_is_kept(name: str, ranks: RankPool) -> None:
    stage = 3 if name in ("Adagrad", "SGD", "Adam, decoupled in one group") else 2
    for weights in ranks.run(train, name=name, stage=stage):
        for got, right in zip(weights, plain(name), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=2e-6)


def kept_on_demand() -> None:
    """The user's optimizer, where the config says so, and where stage 0 offloads nothing."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for config in (
        {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero},
        {"zero_optimization": {**zero, "stage": 0}},
    ):
        prepared = accelerator(config)
        model = net()
        optimizer = AdamW(model.parameters(), lr=0.1)
        engine, sharded, _ = prepared.prepare(model, optimizer, loader())
        assert engine.basic_optimizer is optimizer
        train_step(prepared, engine, sharded, batch())
        prepared.free_memory()


def held_elsewhere() -> None:
    """Somebody who only has the user's optimizer, as schedulers of other libraries do, still sets the rate."""
    prepared = accelerator(zero_stage=2, offload_optimizer_device="cpu")
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.1)
    engine, sharded, _ = prepared.prepare(model, optimizer, loader())
    optimizer.param_groups[0]["lr"] = 0.25
    assert engine.get_lr() == [0.25]
    assert sharded.param_groups[0]["lr"] == 0.25
    prepared.free_memory()


@pytest.mark.parametrize("function", [kept_on_demand, held_elsewhere], ids=lambda f: f.__name__)
def test_the_users_optimizer(function: Callable[[], None], ranks: RankPool) -> None:
    ranks.run(function)


REFUSED: dict[str, tuple[Callable[[Any], Any], int, list[str]]] = {
    "Adafactor": (Adafactor, 2, ["Adafactor needs whole parameters", "ZeRO stage 2", "zero_stage=0"]),
    "Adafactor at stage 3": (Adafactor, 3, ["Adafactor needs whole parameters", "ZeRO stage 3", "zero_stage=0"]),
    "LBFGS": (LBFGS, 2, ["LBFGS", "several times a step", "another optimizer"]),
    "LBFGS at stage 0": (LBFGS, 0, ["LBFGS", "several times a step", "another optimizer"]),
}


def refusal(name: str) -> str:
    make, stage, _ = REFUSED[name]
    prepared = accelerator(zero_stage=stage, offload_optimizer_device="cpu" if stage else "none")
    model = net()
    with pytest.raises(ValueError) as caught:
        prepared.prepare(model, make(model.parameters()), loader())
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_would_follow_another_rule_is_refused(name: str, ranks: RankPool) -> None:
    for text in ranks.run(refusal, name=name):
        for part in REFUSED[name][2]:
            assert part in text
