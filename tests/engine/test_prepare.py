"""`prepare()`: what goes in comes back prepared, in the caller's order, or one error says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from tests.distributed.pool import RankPool
from tests.engine.small import accelerator, loader, net, train_step
from zeroaccel.engine.scheduler import DummyScheduler

# --- order, subset, what is left alone ------------------------------------------------------------------------------


def orders(values: list[str]) -> list[list[str]]:
    """Each value at each place, with others before and behind it."""
    turned = [values[start:] + values[:start] for start in range(len(values))]
    return turned + [order[::-1] for order in turned]


def prepared_in_order() -> list[list[str]]:
    results = []
    for order in orders(["model", "optimizer", "loader", "scheduler"]):
        prepared = accelerator(zero_stage=0)
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1)
        objects = {"model": model, "optimizer": optimizer, "loader": loader(), "scheduler": LinearLR(optimizer)}
        results.append([type(value).__name__ for value in prepared.prepare(*(objects[name] for name in order))])
        prepared.free_memory()
    return results


def test_objects_come_back_in_the_callers_order_whatever_it_is(ranks: RankPool) -> None:
    names = ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DataLoaderShard", "AcceleratedScheduler"]
    for results in ranks.run(prepared_in_order):
        assert results == orders(names)


def types_and_identity() -> None:
    from deepspeed import DeepSpeedEngine

    from zeroaccel.engine.optimizer import AcceleratedOptimizer, DeepSpeedOptimizerWrapper
    from zeroaccel.engine.scheduler import AcceleratedScheduler, DeepSpeedSchedulerWrapper

    prepared = accelerator(zero_stage=2)
    model = net()
    optimizer = AdamW(model.parameters())
    scheduler, one_loader, thing = LambdaLR(optimizer, lambda _: 1.0), loader(), SimpleNamespace(a=1)
    loss = nn.MSELoss()
    result = prepared.prepare(one_loader, None, thing, model, "text", scheduler, 7, one_loader, optimizer, loss, model)
    first, nothing, same_thing, engine, text, wrapped, seven, second, sharded, same_loss, again = result
    assert nothing is None
    assert same_thing is thing
    assert same_loss is loss
    assert (text, seven) == ("text", 7)
    assert first is second
    assert first is not one_loader
    assert engine is again
    assert isinstance(engine, DeepSpeedEngine)
    assert engine.module is model
    assert isinstance(sharded, DeepSpeedOptimizerWrapper)
    assert isinstance(sharded, AcceleratedOptimizer)
    assert isinstance(sharded, torch.optim.Optimizer)
    assert isinstance(wrapped, AcceleratedScheduler)
    assert not isinstance(wrapped, DeepSpeedSchedulerWrapper)

    # What was prepared comes back as it is, alone or with others.
    assert prepared.prepare(engine, sharded, first, wrapped) == (engine, sharded, first, wrapped)
    assert prepared.prepare(first) is first
    assert prepared.prepare_data_loader(first) is first
    assert (prepared._models, prepared._optimizers) == ([engine], [sharded])
    assert (prepared._dataloaders, prepared._schedulers) == ([first], [wrapped])

    # A scheduler made from the prepared optimizer drives the one inside.
    late = prepared.prepare(LambdaLR(sharded, lambda step: 0.5**step))
    train_step(prepared, engine, sharded, next(iter(first))[0])
    late.step()
    assert engine.get_lr() == late.get_last_lr() == [pytest.approx(1e-3 * 0.25)]
    prepared.free_memory()


def test_types_and_what_is_left_alone(ranks: RankPool) -> None:
    ranks.run(types_and_identity)


def apart() -> None:
    prepared = accelerator(zero_stage=2)
    # Loaders first. The shuffled one is for training, in whichever call it comes.
    prepared.prepare(loader(2))
    prepared.prepare(loader(6, shuffle=True))
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = LinearLR(optimizer)
    engine, sharded = prepared.prepare(model, optimizer)
    assert engine.train_micro_batch_size_per_gpu() == 6
    # The scheduler after its optimizer, with `prepare` or `prepare_scheduler`.
    assert prepared.prepare(scheduler).optimizers == [sharded]
    assert prepared.prepare_scheduler(LinearLR(sharded)).optimizers == [sharded]
    # A second model, without a loader: the batch size is known.
    prepared.prepare(loader(3))
    other = net()
    engine, _ = prepared.prepare(other, SGD(other.parameters(), lr=0.1))
    assert engine.train_micro_batch_size_per_gpu() == 6
    # After free_memory() all is forgotten.
    prepared.free_memory()
    prepared.prepare(loader(5))
    again = net()
    engine, _ = prepared.prepare(again, SGD(again.parameters(), lr=0.1))
    assert engine.train_micro_batch_size_per_gpu() == 5
    prepared.free_memory()


def test_objects_can_be_prepared_in_several_calls(ranks: RankPool) -> None:
    ranks.run(apart)


def two_models() -> None:
    prepared = accelerator(zero_stage=2)
    one, two = net(), net()
    fast, slow = SGD(one.parameters(), lr=0.5), SGD(two.parameters(), lr=0.1)
    second_scheduler, first_scheduler = LambdaLR(slow, lambda step: 0.1**step), LambdaLR(fast, lambda step: 0.5**step)
    result = prepared.prepare(slow, one, second_scheduler, loader(), two, first_scheduler, fast)
    slow_, one_, second_, batches, two_, first_, fast_ = result
    assert (one_.module, two_.module) == (one, two)
    x = next(iter(batches))[0]
    before = [model.module.first.weight.detach().clone() for model in (one_, two_)]
    train_step(prepared, two_, slow_, x)
    assert torch.equal(one_.module.first.weight, before[0])
    assert not torch.equal(two_.module.first.weight, before[1])
    second_.step()
    assert two_.get_lr() == [pytest.approx(0.1 * 0.01)]
    assert one_.get_lr() == [0.5]
    train_step(prepared, one_, fast_, x)
    first_.step()
    assert one_.get_lr() == [pytest.approx(0.5 * 0.25)]
    prepared.free_memory()


def test_two_models_keep_their_own_optimizers_and_schedulers(ranks: RankPool) -> None:
    ranks.run(two_models)


# --- refusals -------------------------------------------------------------------------------------------------------


def foreign_optimizer(prepared: Any) -> None:
    prepared.prepare(net(), AdamW(net().parameters()), loader())


def optimizer_alone(prepared: Any) -> None:
    prepared.prepare(SGD(net().parameters(), lr=0.1))


def optimizer_of_two(prepared: Any) -> None:
    one, two = net(), net()
    prepared.prepare(one, two, SGD([*one.parameters(), *two.parameters()], lr=0.1), loader())


def two_optimizers(prepared: Any) -> None:
    model = net()
    prepared.prepare(model, AdamW(model.first.parameters()), SGD(model.last.parameters(), lr=0.1), loader())


def no_optimizer(prepared: Any) -> None:
    prepared.prepare(net(), loader())


def placement(prepared: Any) -> None:
    model = net()
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), device_placement=[True, False])


def wrong_number_of_flags(prepared: Any) -> None:
    prepared.prepare(net(), loader(), device_placement=[True])


def device_map(prepared: Any) -> None:
    model = net()
    model.first.hf_device_map = {"first": 0, "last": "cpu"}  # type: ignore[assignment]
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader())


def foreign_scheduler(prepared: Any) -> None:
    model = net()
    scheduler = LinearLR(SGD(net().parameters(), lr=0.1))
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), scheduler, loader())


def dummy_scheduler_alone(prepared: Any) -> None:
    prepared.prepare(DummyScheduler(SGD(net().parameters(), lr=0.1), total_num_steps=3))


def deepspeed_scheduler_late(prepared: Any) -> None:
    from deepspeed.runtime.lr_schedules import WarmupLR

    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    prepared.prepare(model, optimizer, loader())
    prepared.prepare(WarmupLR(optimizer))


def prepared_model_again(prepared: Any) -> None:
    model = net()
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader())
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader())


def prepared_optimizer_again(prepared: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    prepared.prepare(model, optimizer, loader())
    prepared.prepare(optimizer)


def empty_group(prepared: Any) -> None:
    model = net()
    optimizer = SGD([{"params": model.parameters()}, {"params": []}], lr=0.1)
    prepared.prepare(model, optimizer, LinearLR(optimizer), loader())


def no_loader(prepared: Any) -> None:
    model = net()
    prepared.prepare(model, SGD(model.parameters(), lr=0.1))


def loader_without_batch_size(prepared: Any) -> None:
    model = net()
    prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader(batch_size=None))


def mixture_of_experts(prepared: Any) -> None:
    prepared.deepspeed_plugin.transformer_moe_cls_names = "SparseBlock"
    no_loader_needed = net()
    prepared.prepare(no_loader_needed, SGD(no_loader_needed.parameters(), lr=0.1), loader())


# what is prepared, and what the error must say: the offending value first, the remedy last
REFUSALS: list[tuple[Callable[[Any], None], list[str]]] = [
    (foreign_optimizer, ["AdamW holds no parameter of a model", "model, optimizer = accelerator.prepare("]),
    (optimizer_alone, ["SGD holds no parameter", "model, optimizer = accelerator.prepare("]),
    (optimizer_of_two, ["SGD holds parameters of 2 models (Net, Net)", "one torch.nn.Module"]),
    (two_optimizers, ["AdamW and SGD both hold parameters of one Net", "several param groups"]),
    (no_optimizer, ["ZeRO stage 2", "Net without one", "pass the optimizer in the same call"]),
    (placement, ["device_placement", "leave it out"]),
    (wrong_number_of_flags, ["1 flags for 2 objects", "give one each"]),
    (device_map, ["Linear", "2 entries", "load it without device_map"]),
    (foreign_scheduler, ["LinearLR drives an optimizer that was not prepared", "all three in one call"]),
    (dummy_scheduler_alone, ["DummyScheduler", "together with its model and optimizer"]),
    (deepspeed_scheduler_late, ["WarmupLR", "together with its model and optimizer"]),
    (prepared_model_again, ["this Net was prepared before", "what that prepare() returned"]),
    (prepared_optimizer_again, ["this SGD was prepared before", "what that prepare() returned"]),
    (empty_group, ["param group 1 of SGD has no parameter to train", "LinearLR", "leave the group out"]),
    (no_loader, ["train_micro_batch_size_per_gpu", "no DataLoader", "pass a DataLoader with a batch_size"]),
    (loader_without_batch_size, ["train_micro_batch_size_per_gpu", "batch_size=None", "write a number"]),
    (mixture_of_experts, ["transformer_moe_cls_names", "SparseBlock", "it has Linear, Net"]),
]


def refusal(number: int) -> tuple[str, str]:
    prepared = accelerator(zero_stage=2)
    try:
        REFUSALS[number][0](prepared)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        prepared.free_memory()
    return "nothing", "was refused"


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=[case.__name__ for case, _ in REFUSALS])
def test_what_cannot_work_is_one_error_with_the_remedy(number: int, ranks: RankPool) -> None:
    for kind, text in ranks.run(refusal, number=number):
        assert kind == "ConfigError", text
        for part in REFUSALS[number][1]:
            assert part in text


def kept_by_refusals() -> None:
    """After an error the same objects can be prepared right."""
    prepared = accelerator(zero_stage=2)
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    for wrong in ((optimizer,), (model,), (model, optimizer, LinearLR(SGD(net().parameters(), lr=0.1)))):
        with pytest.raises(ValueError):
            prepared.prepare(*wrong, loader())
    engine, sharded, batches = prepared.prepare(model, optimizer, loader())
    train_step(prepared, engine, sharded, next(iter(batches))[0])
    prepared.free_memory()


def test_an_error_leaves_the_objects_usable(ranks: RankPool) -> None:
    ranks.run(kept_by_refusals)
