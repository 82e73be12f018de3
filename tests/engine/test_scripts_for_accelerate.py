"""What scripts with several models do beyond the loop: save each, subclass, hold DeepSpeed's wrappers, initialize."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool, reset_states
from tests.engine.loop import Kind, Loop
from tests.engine.situations_models import Pair, chained, loop_of, start
from tests.engine.small import accelerator, loader, net, samples
from tests.parity.problem import full_weights


def _train(loops: Iterable[Loop], numbers: range) -> None:
    for number in numbers:
        for loop in loops:
            loop.backward(loop.loss(number))
            loop.step()


def _weights(loops: Iterable[Loop]) -> list[dict[str, torch.Tensor]]:
    return [full_weights(loop.model) for loop in loops]


def _loops(two_accelerators: bool) -> tuple[Loop, Loop]:
    from zeroaccel import Accelerator

    pair = Pair(Kind(2), Kind(3))
    one = start(pair)
    return loop_of(one, pair, "first"), loop_of(Accelerator() if two_accelerators else one, pair, "second")


def saved_apart(folder: str) -> None:
    """Each `Accelerator` saves its model, at another step than the other."""
    one, two = loops = _loops(two_accelerators=True)
    _train(loops, range(2))
    one.accelerator.save_state(f"{folder}/one")
    _train([one], range(2, 3))
    two.accelerator.save_state(f"{folder}/two")
    _train(loops, range(3, 5))
    wanted = _weights(loops)
    one, two = loops = _loops(two_accelerators=True)
    two.accelerator.load_state(f"{folder}/two")
    _train([two], range(3, 5))
    one.accelerator.load_state(f"{folder}/one")
    _train([one], range(2, 5))
    _equal(_weights(loops), wanted)


def saved_together(folder: str) -> None:
    """One `Accelerator` saves both."""
    loops = _loops(two_accelerators=False)
    _train(loops, range(2))
    loops[0].accelerator.save_state(folder)
    _train(loops, range(2, 4))
    wanted = _weights(loops)
    loops = _loops(two_accelerators=False)
    loops[0].accelerator.load_state(folder)
    _train(loops, range(2, 4))
    _equal(_weights(loops), wanted)


def _equal(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("check", [saved_apart, saved_together])
def test_models_are_saved_and_go_on(check: Any, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(check, folder=str(tmp_path))


def backward_of_a_subclass() -> None:
    """It calls the wrapped engine, which steps as in Accelerate, so that `optimizer.step()` has nothing to do."""
    from zeroaccel import Accelerator, DeepSpeedPlugin
    from zeroaccel.utils import DeepSpeedEngineWrapper
    from zeroaccel.utils.deepspeed import DeepSpeedOptimizerWrapper

    class Own(Accelerator):
        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            assert self.deepspeed_engine_wrapped is not None
            self.deepspeed_engine_wrapped.backward(loss, sync_gradients=self.sync_gradients, **kwargs)

    for stage in range(4):
        reset_states()
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=0.5)
        own, model, plain = Own(deepspeed_plugin=plugin), net(), net()
        optimizer, peer = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain))
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, peer)]
        model, optimizer, batches, scheduler = own.prepare(model, optimizer, loader(4), schedulers[0])
        assert isinstance(own.deepspeed_engine_wrapped, DeepSpeedEngineWrapper)
        assert own.deepspeed_engine_wrapped.engine is optimizer.engine is model
        assert isinstance(optimizer, DeepSpeedOptimizerWrapper)
        for (x,) in batches:
            with own.accumulate(model):
                own.backward(model(x).pow(2).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        for x in samples().tensors[0].view(4, 16, 8):
            plain(x).pow(2).mean().backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            peer.step()
            peer.zero_grad()
            schedulers[1].step()
            schedulers[1].step()  # once a process
        weights = full_weights(model)
        for name, value in plain.named_parameters():
            torch.testing.assert_close(weights[name], value.detach(), rtol=0, atol=1e-6)
        own.free_memory()
        assert own.deepspeed_engine_wrapped is None


def a_reference_made_by_deepspeed_itself() -> None:
    """With the plugin's config, as libraries for preference optimization do."""
    import deepspeed

    for stage in (2, 3):
        made, model = accelerator(zero_stage=stage), net()
        model, optimizer, _ = made.prepare(model, torch.optim.AdamW(model.parameters()), loader(4))
        config = copy.deepcopy(made.state.deepspeed_plugin.deepspeed_config)
        if stage != 3:
            config["zero_optimization"]["stage"] = 0
        reference, *_ = deepspeed.initialize(model=net(), config=config)
        x = torch.ones(2, 8)
        for _ in range(2):
            with torch.no_grad():
                wanted = reference(x)
            torch.testing.assert_close(wanted, net()(x), rtol=0, atol=1e-6)
            made.backward((model(x) - wanted).pow(2).mean() + model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        made.free_memory()


def an_overflow_spares_the_other_model() -> None:
    """Gradients of the fp32 model come through an fp16 one, whose loss scale is far too large at first."""
    pair = Pair(Kind(2, precision="fp16"), Kind(2))
    made = start(pair)
    made.state.get_deepspeed_plugin("first").deepspeed_config["fp16"] |= {"loss_scale": 0, "initial_scale_power": 32}
    half, whole = loop_of(made, pair, "first"), loop_of(made, pair, "second")
    skipped = []
    for number in range(30):
        made.backward(chained(whole.model, half.model, half.batch(number)))
        for loop in (half, whole):
            loop.step()
        skipped.append(whole.optimizer.step_was_skipped)
    assert skipped[0]
    assert not skipped[-1]
    assert all(torch.isfinite(value).all() for weights in _weights([half, whole]) for value in weights.values())


def plugins_by_name() -> None:
    from zeroaccel.utils import get_active_deepspeed_plugin

    made = start(Pair(Kind(2), Kind(3)))
    second = made.state.get_deepspeed_plugin("second")
    assert get_active_deepspeed_plugin(made.state) is made.state.get_deepspeed_plugin("first")
    made.state.select_deepspeed_plugin("second")
    assert get_active_deepspeed_plugin(made.state) is made.deepspeed_plugin is second
    engine = made.prepare(net())
    assert engine.zero_optimization_stage() == 3
    made.state.select_deepspeed_plugin("first")
    assert second.deepspeed_config["zero_optimization"]["stage"] == 3
    assert made.deepspeed_plugin.zero_stage == 2
    made.free_memory()


@pytest.mark.parametrize(
    "check",
    [
        backward_of_a_subclass,
        a_reference_made_by_deepspeed_itself,
        an_overflow_spares_the_other_model,
        plugins_by_name,
    ],
)
def test_on_two_ranks(check: Any, ranks: RankPool) -> None:
    ranks.run(check)
