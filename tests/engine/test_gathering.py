"""Whole parameters for a while: read on every rank, and changed so that training goes on from the change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.checkpoint import models
from tests.distributed.pool import RankPool, reset_states
from tests.engine.small import accelerator
from zeroaccel import Accelerator
from zeroaccel.errors import ConfigTypeError, DistributedError, UsageError
from zeroaccel.utils import logical_shape


def _masters(running: Any, model: Any) -> dict[tuple[str, int], torch.Tensor]:
    """This rank's fp32 masters, by name and first element."""
    share, found = running._backend.share(model), {}
    with share.at_rest():
        for shard in share.trained:
            with shard.opened() as tensors:
                for part in shard.slices:
                    found[part.name, part.start] = tensors["weight"].narrow(0, part.offset, part.count).cpu().clone()
    return found


def _change(stage: int, precision: str, offload: str, path: str) -> None:
    """Rank 0 changes weights in three ways; the masters follow, element by element; a step does not undo it."""
    places = {"offload_optimizer_nvme_path": path, "offload_param_nvme_path": path} if offload == "nvme" else {}
    running, model, optimizer = models.trained(stage, offload, precision, **places)
    module = model.module
    before, weights = _masters(running, model), models.whole(model)
    with running.gathered_parameters(model):
        assert all(parameter.shape == logical_shape(parameter) for parameter in model.parameters())
        copied = {name: value.cpu().clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, weights[name]) for name, value in copied.items())
    chosen = [module.hidden.weight, module.scale, module.frozen.weight, module.head.weight]
    with running.gathered_parameters(chosen, modify=True):
        if running.process_index == 0:
            module.hidden.weight.data[0] = 0.5
            module.frozen.weight.data = torch.full_like(module.frozen.weight, 0.25)
            with torch.no_grad():
                module.scale.fill_(3.0)
    expected = {name: value.clone() for name, value in weights.items() if name != "average"}  # one on each rank
    expected["hidden.weight"][0] = 0.5
    expected["scale"].fill_(3.0)
    expected["frozen.weight"].fill_(0.25)
    now = models.whole(model)
    assert [name for name, value in expected.items() if not torch.equal(now[name], value)] == []
    for (name, start), master in _masters(running, model).items():
        wanted = before[name, start].clone()
        if name == "scale":
            wanted.fill_(3.0)
        if name == "hidden.weight":
            wanted[torch.arange(start, start + len(wanted)) < models.FEATURES] = 0.5
        assert torch.equal(master, wanted), name
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tokens = models.tokens()
    running.backward(F.cross_entropy(model(tokens).float(), tokens.roll(1)))
    optimizer.step()
    now = models.whole(model)
    assert [name for name, value in expected.items() if not torch.equal(now[name], value)] == []


KINDS = [
    *((stage, "no", "none") for stage in (0, 1, 2, 3)),
    *((stage, "bf16", "none") for stage in (0, 1, 2, 3)),
    *((stage, precision, "cpu") for stage, precision in ((2, "fp16"), (3, "bf16"))),
    (0, "fp16", "none"),
    (3, "bf16", "nvme"),
]
MORE = [
    *((stage, precision, "cpu") for stage in (1, 2, 3) for precision in ("no", "bf16", "fp16")),
    *((stage, "fp16", "none") for stage in (1, 2, 3)),
    *((3, precision, "nvme") for precision in ("no", "fp16")),
]


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [*KINDS, *(pytest.param(*kind, marks=pytest.mark.full) for kind in MORE if kind not in KINDS)],
)
def test_changes_of_rank_0_last(ranks: RankPool, tmp_path: Any, stage: int, precision: str, offload: str) -> None:
    ranks.run(_change, stage=stage, precision=precision, offload=offload, path=str(tmp_path))


def _refuse(stage: int) -> list[str]:
    """What each way of doing it wrong ends in, on this rank."""
    running, model, _ = models.trained(stage, steps=0)
    weight, told = model.module.hidden.weight, []

    def attempt(act: Any, *what: Any, **options: Any) -> None:
        try:
            with running.gathered_parameters(*what, **options):
                act()
        except Exception as error:
            told.append(type(error).__name__)
        else:
            told.append("")

    def through_data() -> None:
        if running.process_index == 1:
            weight.data[0] = 7

    def fail() -> None:
        if running.process_index == 0:
            raise ValueError

    def resize() -> None:
        weight.data = torch.zeros(3)

    def nested() -> None:
        with running.gathered_parameters(model):
            assert weight.shape == (7, 7)
        assert weight.shape == (7, 7)

    def nested_change() -> None:
        with running.gathered_parameters(weight, modify=True):
            pass

    attempt(through_data, model)
    attempt(lambda: weight.data.mul_(2), [weight])
    attempt(fail, model, modify=True)
    attempt(fail, model)
    attempt(resize, weight, modify=True)
    attempt(nested, model)
    attempt(nested_change, model)
    attempt(nested_change, model, modify=True)
    attempt(lambda: None, "hidden.weight")
    attempt(lambda: None, model, modify=running.is_main_process)
    attempt(lambda: None, [])
    return told


@pytest.mark.parametrize("stage", [1, 3])
def test_what_cannot_be_kept_is_an_error_on_all_ranks(ranks: RankPool, stage: int) -> None:
    usage, other, wrong = UsageError.__name__, DistributedError.__name__, ConfigTypeError.__name__
    common = ["", usage, "", wrong, other, ""]
    first, second = ranks.run(_refuse, stage=stage)
    assert first == [other, usage, "ValueError", "ValueError", usage, *common]
    assert second == [usage, usage, other, other, usage, *common]


def _unprepared(stage: int) -> list[float]:
    """A model that is not prepared: born partitioned at stage 3, below it whole, another one on each rank."""
    running = accelerator(zero_stage=stage)
    with running.zero_init():
        model = nn.Linear(3, 3)
    with running.gathered_parameters(model, modify=True):
        nn.init.constant_(model.weight, float(running.process_index + 1))
    with running.gathered_parameters(model.weight):
        return sorted(set(model.weight.flatten().tolist()))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_that_is_not_prepared(ranks: RankPool, stage: int) -> None:
    assert ranks.run(_unprepared, stage=stage) == [[1.0], [1.0]]


def test_without_deepspeed() -> None:
    reset_states()
    running = Accelerator(cpu=True)
    model = running.prepare(nn.Linear(2, 2))
    with running.gathered_parameters(model, modify=True):
        model.weight.data.fill_(2.0)
    assert torch.all(model.weight == 2.0)
    with pytest.raises(UsageError, match="modify=True"), running.gathered_parameters(model.weight):
        model.weight.data.fill_(3.0)
