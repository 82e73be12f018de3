"""Modules that only some ranks run: right, or refused with the module and the ranks named."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.pool import RankFailed, RankPool, device
from tests.engine.small import accelerator
from tests.parity.problem import DTYPES, full_weights
from zeroaccel.errors import DistributedError

FEATURES = 6
STEPS = 6


class Experts(nn.Module):
    """Layers of which a call runs those that it names, however many."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"a": 8, "b": 8, "c": 24, "d": 8}
        self.layers = nn.ModuleDict({name: nn.Linear(8, size) for name, size in sizes.items()})

    def forward(self, x: torch.Tensor, names: str) -> torch.Tensor:
        for name in names:
            x = x + self.layers[name](x)[:, :8]
        return x


class Net(nn.Module):
    """A trunk, experts between, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, 8)
        self.experts = Experts()
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, names: str) -> torch.Tensor:
        hidden = torch.tanh(self.trunk(x.to(self.trunk.weight.dtype)))
        return self.head(self.experts(hidden, names)).float()


@dataclass(frozen=True)
class Routes:
    """Which experts each rank runs in each backward pass; `passes[i][rank]`.

    Attributes:
        passes: one after the other, repeated for six steps.
        steps: gradient accumulation steps.
        backwards: passes of one micro-batch.
    """

    passes: tuple[tuple[str, str], ...]
    steps: int = 1
    backwards: int = 1


ROUTES = {
    "two of one size": Routes((("a", "b"),)),
    "on rank 0 only": Routes((("a", ""),)),
    "on rank 1 only": Routes((("", "a"),)),
    "of other sizes": Routes((("ab", "c"),)),
    "in another order": Routes((("abd", "dba"),)),
    "they differ from the second pass on": Routes((("a", "a"), ("a", "b"), ("cd", ""), ("", "ab"))),
    "they differ at first only": Routes((("a", "b"), ("d", "d"), ("c", "c"), ("d", "d"))),
    "in a window": Routes((("a", "b"), ("", "c")), steps=2),
    "in two losses": Routes((("a", "b"), ("bd", "")), backwards=2),
}


def _batch(number: int, rank: int) -> torch.Tensor:
    return torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(100 * number + rank)).to(device())


def _reference(routes: Routes, precision: str) -> dict[str, torch.Tensor]:
    """Plain PyTorch on both ranks' batches; fp32 masters, gradients in the precision."""
    torch.manual_seed(3)
    masters, model = Net().to(device()), Net().to(device(), DTYPES[precision])
    optimizer = torch.optim.SGD(masters.parameters(), lr=0.1, momentum=0.9)
    turns = itertools.cycle(routes.passes)
    for step in range(STEPS):
        model.load_state_dict(masters.state_dict())
        for micro in range(routes.steps * routes.backwards):
            for rank, names in enumerate(next(turns)):
                loss = model(_batch(10 * step + micro, rank), names).square().mean() / 2 / routes.steps
                loss.backward()  # type: ignore[no-untyped-call]
        for master, weight in zip(masters.parameters(), model.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        optimizer.step()
    return {name: weight.detach() for name, weight in masters.to(DTYPES[precision]).float().named_parameters()}


def _train(
    routes: Routes,
    zero: dict[str, Any],
    precision: str = "no",
    fp32_accumulation: bool = False,
    plugin: dict[str, Any] | None = None,
) -> float:
    """The largest difference of a weight from the reference's."""
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": routes.steps,
        "zero_optimization": zero,
        **({} if precision == "no" else {precision: {"enabled": True}}),
        **({"fp16": {"enabled": True, "loss_scale": 128}} if precision == "fp16" else {}),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if fp32_accumulation else {}),
        "zero_force_ds_cpu_optimizer": False,
    }
    running = accelerator(config, **(plugin or {}))
    torch.manual_seed(3)
    model = Net()
    model, optimizer = running.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    turns = itertools.cycle(routes.passes)
    for step in range(STEPS):
        for window in range(routes.steps):
            with running.accumulate(model):
                for pass_ in range(routes.backwards):
                    number = 10 * step + window * routes.backwards + pass_
                    names = next(turns)[running.process_index]
                    running.backward(model(_batch(number, running.process_index), names).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    reference = _reference(routes, precision)
    found = full_weights(model)
    return max(float((found[name].to(weight) - weight).abs().max()) for name, weight in reference.items())


KINDS: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 1, overlapping": {"stage": 1, "overlap_comm": True},
    "stage 2": {"stage": 2},
    "stage 2, small buckets": {"stage": 2, "reduce_bucket_size": 60},
    "stage 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 2, overlapping": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 60},
}
TOLERANCE = {"no": 2e-6, "bf16": 8e-3, "fp16": 1e-3}  # in 16 bit of a rounded weight


def _train_all(
    zero: dict[str, Any], precision: str = "no", fp32_accumulation: bool = False, **plugin: Any
) -> dict[str, float]:
    return {name: _train(routes, zero, precision, fp32_accumulation, plugin) for name, routes in ROUTES.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_run_different_modules_get_the_gradients_of_all(ranks: RankPool, kind: str) -> None:
    for distances in ranks.run(_train_all, zero=KINDS[kind]):
        assert {name: distance for name, distance in distances.items() if distance > TOLERANCE["no"]} == {}


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_run_different_modules_in_16_bit(ranks: RankPool, kind: str, precision: str) -> None:
    for distances in ranks.run(_train_all, zero=KINDS[kind], precision=precision):
        assert {name: distance for name, distance in distances.items() if distance > TOLERANCE[precision]} == {}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "stage 2, small buckets"])
def test_ranks_that_run_different_modules_in_bf16_with_fp32_accumulation(ranks: RankPool, kind: str) -> None:
    for distances in ranks.run(_train_all, zero=KINDS[kind], precision="bf16", fp32_accumulation=True):
        assert {name: distance for name, distance in distances.items() if distance > TOLERANCE["bf16"]} == {}


@pytest.mark.parametrize(("threshold", "offload"), [(0, "cpu"), (1000, "none")])  # all are gathered, or none
def test_stage_3_trains_mixtures_of_experts_whose_class_is_named(ranks: RankPool, threshold: int, offload: str) -> None:
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": threshold,
        "reduce_bucket_size": 100,
        "offload_optimizer": {"device": offload},
    }
    for distances in ranks.run(_train_all, zero=zero, transformer_moe_cls_names="Experts"):
        assert {name: distance for name, distance in distances.items() if distance > TOLERANCE["no"]} == {}


def _refusal(route: str) -> str:
    try:
        _train(ROUTES[route], {"stage": 3, "stage3_param_persistence_threshold": 0})
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("route", "rank_0", "rank_1"),
    [
        ("two of one size", "forward of experts.layers.a", "forward of experts.layers.b"),
        ("on rank 1 only", "forward of head", "forward of experts.layers.a"),
    ],
)
def test_stage_3_names_the_modules_that_only_some_ranks_run(
    ranks: RankPool, route: str, rank_0: str, rank_1: str
) -> None:
    for message in ranks.run(_refusal, route=route):
        assert f"rank 0: {rank_0} (Linear)" in message
        assert f"rank 1: {rank_1} (Linear)" in message
        assert "transformer_moe_cls_names" in message


def _part(how: str, folder: str) -> str:
    """Three steps in one order, then rank 1 alone goes another way."""
    from zeroaccel import InitProcessGroupKwargs
    from zeroaccel.state import meeting

    meeting.PATIENCE = 0.5
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=6))
    config = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    running = accelerator(config, options={"kwargs_handlers": [timeout]})
    model = Net()
    model, optimizer = running.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rank = running.process_index
    try:
        for step in range(6):
            parted = step > 2 and rank == 1
            if parted and how == "evaluation":
                with torch.no_grad():
                    model(_batch(step, rank), "a")
            running.backward(model(_batch(step, rank), "b" if parted and how == "module" else "a").square().mean())
            optimizer.step()
            optimizer.zero_grad()
    except DistributedError as error:
        (Path(folder) / f"rank {rank}").write_text(str(error))
        os._exit(3)  # as a script that fails
    return "nothing was raised"


@pytest.mark.parametrize(
    ("how", "there", "before"),
    [
        ("module", "forward of experts.layers.b (Linear)", "forward of experts.layers.a (Linear)"),
        pytest.param(
            "evaluation", "the beginning of another pass", "backward of the model (Net)", marks=pytest.mark.full
        ),
    ],
)
def test_a_rank_that_leaves_the_order_of_earlier_passes_is_named(
    ranks: RankPool, tmp_path: Path, how: str, there: str, before: str
) -> None:
    pool = RankPool(2, ranks.device)  # of its own, with a short timeout
    with pytest.raises(RankFailed) as caught:
        pool.run(_part, how=how, folder=str(tmp_path))
    told = (tmp_path / "rank 1").read_text()
    assert f"at ZeRO stage 3: rank 1 is at {there}, and rank 0 did not come there" in told
    assert f"In earlier passes {before} came next" in told
    assert "nothing was raised" not in str(caught.value.results)


def _wander() -> float:
    """All ranks change their way together, with evaluation in between."""
    ways = Routes((("a", "a"), ("a", "a"), ("b", "b"), ("abc", "abc"), ("", "")))
    return _train(ways, {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100})


def test_stage_3_trains_where_all_ranks_change_their_way(ranks: RankPool) -> None:
    assert max(ranks.run(_wander)) < TOLERANCE["no"]


def _loop_within_a_pass() -> tuple[int, int]:
    """How often ranks meet in the first and the second hundred calls of a part, whose model is not called meanwhile."""
    from zeroaccel.engine import fetch_order

    running = accelerator({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    experts, met, meet = running.prepare(Net()).module.experts, [], fetch_order.meet

    def counted(*arguments: Any) -> bool:
        met.append(arguments)
        return meet(*arguments)

    fetch_order.meet = counted
    try:
        with torch.no_grad():
            hidden = torch.ones(3, 8, device=device())
            for _ in range(100):
                experts(hidden, "ab")
            first = len(met)
            for _ in range(100):
                experts(hidden, "ab")
    finally:
        fetch_order.meet = meet
    return first, len(met) - first


def test_ranks_stop_comparing_in_a_loop_within_a_pass(ranks: RankPool) -> None:
    for first, then in ranks.run(_loop_within_a_pass):
        assert first > 0
        assert then == 0


def _evaluate_other_modules() -> str:
    running = accelerator({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    model = Net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = running.prepare(model)
    model.eval()
    try:
        with torch.no_grad():
            model(_batch(0, 0), "ab"[running.process_index])
    except DistributedError as error:
        return str(error)
    return "nothing was raised"


def test_stage_3_compares_ranks_in_inference_too(ranks: RankPool) -> None:
    for message in ranks.run(_evaluate_other_modules):
        assert "rank 1: forward of experts.layers.b (Linear)" in message
