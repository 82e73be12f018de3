"""The optimizer that `prepare()` returns: it is the one that steps, at every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, NAdam
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from tests.distributed.pool import RankPool
from tests.engine.small import FEATURES, accelerator, loader, net, train_step
from zeroaccel.engine.optimizer import DummyOptim

KINDS = ((0, "none"), (1, "none"), (2, "cpu"), (3, "none"), (3, "cpu"))


def full(model: torch.nn.Module) -> list[torch.Tensor]:
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


def assigned_rate() -> None:
    x = torch.ones(2, FEATURES)
    for stage, offload in KINDS:
        prepared = accelerator(zero_stage=stage, offload_optimizer_device=offload)
        model = net()
        optimizer = SGD([{"params": model.first.parameters()}, {"params": model.last.parameters()}], lr=0.5)
        engine, sharded, _ = prepared.prepare(model, optimizer, loader())
        reference = net()
        reference(x).pow(2).mean().backward()
        sharded.param_groups[0]["lr"] = 0.0
        sharded.param_groups[1]["lr"] = 0.25
        assert engine.get_lr() == [0.0, 0.25]
        train_step(prepared, engine, sharded, x)
        for got, start, rate in zip(full(model), reference.parameters(), (0.0, 0.0, 0.25, 0.25), strict=True):
            assert start.grad is not None
            torch.testing.assert_close(got, start - rate * start.grad, rtol=0, atol=1e-6)
        prepared.free_memory()


class ScheduleFree(SGD):
    """An optimizer with modes, as schedule-free ones have."""

    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def modes() -> None:
    for stage, offload in KINDS:
        prepared = accelerator(zero_stage=stage, offload_optimizer_device=offload)
        model = net()
        optimizer = ScheduleFree(model.parameters(), lr=0.1)
        engine, sharded, _ = prepared.prepare(model, optimizer, loader())
        for switch, mode in ((sharded.train, "train"), (sharded.eval, "eval")):
            switch()
            assert engine.basic_optimizer.mode == optimizer.mode == mode
        prepared.free_memory()
    model = net()
    _, sharded, _ = prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader())
    sharded.train()  # one without modes does not mind
    prepared.free_memory()


def surface() -> None:
    """What PyTorch and scripts read from an optimizer."""
    from zeroaccel.errors import UnsupportedError, UsageError

    for stage, offload in KINDS:
        prepared = accelerator(zero_stage=stage, offload_optimizer_device=offload)
        model = net()
        optimizer = NAdam(model.parameters(), lr=0.1, betas=(0.5, 0.6))
        engine, sharded, _ = prepared.prepare(model, optimizer, loader())
        assert sharded.defaults["betas"] == (0.5, 0.6)
        assert not sharded.step_was_skipped
        with pytest.raises(UnsupportedError, match=r"add_param_group after prepare\(\).*before prepare\(\)"):
            sharded.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        with pytest.raises(UsageError, match=r"optimizer.step\(closure\) .*run the closure's backward first"):
            sharded.step(lambda: 0.0)
        # A scheduler that needs the defaults can be made from it.
        scheduler = prepared.prepare(OneCycleLR(sharded, max_lr=0.3, total_steps=10))
        train_step(prepared, engine, sharded, torch.ones(2, FEATURES))
        scheduler.step()
        assert engine.get_lr() == scheduler.get_last_lr() != [0.1]
        assert sharded.state
        prepared.free_memory()


def frozen_group() -> None:
    """Groups with nothing to train, of which ZeRO would fail, are taken out; a scheduler could not follow."""
    for stage in (0, 1, 2, 3):
        for dummy in (False, True):
            config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
            if dummy:
                config.update(zero_allow_untested_optimizer=True, optimizer={"type": "SGD", "params": {"lr": 0.1}})
            prepared = accelerator(config)
            model = net()
            model.first.requires_grad_(False)
            before = full(model)
            groups = [{"params": list(part.parameters())} for part in (model.first, model.last)]
            optimizer = DummyOptim(groups) if dummy else SGD(groups, lr=0.1)
            if not dummy and stage > 0:
                with pytest.raises(ValueError, match=r"group 0 of SGD has no parameter to train.*leave the group out"):
                    prepared.prepare(model, optimizer, LinearLR(optimizer), loader())
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
            engine, sharded, _ = prepared.prepare(model, optimizer, loader())
            assert engine.get_lr() == ([0.1, 0.1] if stage == 0 else [0.1])
            train_step(prepared, engine, sharded, torch.ones(2, FEATURES))
            after = full(model)
            assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]
            prepared.free_memory()


def dummy() -> None:
    """DummyOptim with a generator and with groups: DeepSpeed's optimizer gets what the code and the config say."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    }
    for grouped, decays in ((False, [0.2]), (True, [0.5, 0.2])):
        prepared = accelerator(config)
        model = net()
        groups = [{"params": model.first.parameters(), "weight_decay": 0.5}, {"params": model.last.parameters()}]
        params = groups if grouped else model.parameters()
        engine, sharded = prepared.prepare(model, DummyOptim(params, lr=0.02, weight_decay=0.2))
        assert [group["weight_decay"] for group in sharded.param_groups] == decays
        assert engine.get_lr() == [0.02] * len(decays)
        before = full(model)
        train_step(prepared, engine, sharded, torch.ones(2, FEATURES))
        assert all(not torch.equal(old, new) for old, new in zip(before, full(model), strict=True))
        prepared.free_memory()


FUNCTIONS = [assigned_rate, modes, surface, frozen_group, dummy]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_prepared_optimizer(function: Callable[[], None], ranks: RankPool) -> None:
    ranks.run(function)
