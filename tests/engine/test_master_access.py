"""fp32 weights and optimizer state of a parameter, read and set through DeepSpeed's functions before the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoint import models
from tests.distributed.pool import RankPool
from zeroaccel.errors import ConfigError, UsageError
from zeroaccel.utils import logical_shape

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _trained(stage: int, precision: str, offload: str, path: str, steps: int = 2) -> Any:
    places = {"offload_optimizer_nvme_path": path, "offload_param_nvme_path": path} if offload == "nvme" else {}
    return models.trained(stage, offload, precision, steps=steps, **places)


def _whole(stage: int, precision: str, offload: str, path: str) -> None:
    """What is set is what is read, on all ranks, what the model computes with, and what the next step starts from."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    running, model, optimizer = _trained(stage, precision, offload, path, 12 if precision == "fp16" else 2)  # skips
    module, dtype = model.module, DTYPES[precision]
    weights = models.whole(model)
    for name, parameter in module.named_parameters():
        read = safe_get_full_fp32_param(parameter)
        if not parameter.requires_grad:
            assert read is None, name
            continue
        assert read.shape == logical_shape(parameter), name
        assert read.dtype == torch.float32, name
        assert torch.equal(read.to(dtype).cpu(), weights[name]), name
        value = torch.arange(read.numel(), dtype=torch.float32, device=read.device).view(read.shape) / 7 + 0.1
        safe_set_full_fp32_param(parameter, value)
        assert torch.equal(safe_get_full_fp32_param(parameter), value), name
        for key, factor in (("exp_avg", 0.0), ("exp_avg_sq", 2.0)):
            state = safe_get_full_optimizer_state(parameter, key)
            assert state.shape == read.shape, name
            assert float(state.abs().sum()) > 0, name
            safe_set_full_optimizer_state(parameter, value * factor, key)
            assert torch.equal(safe_get_full_optimizer_state(parameter, key), value * factor), name
        read.zero_()  # a copy
        assert torch.equal(safe_get_full_fp32_param(parameter), value), name
        assert torch.equal(models.whole(model)[name], value.to(dtype).cpu()), name
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    running.backward(model.module.loss(models.tokens()) if stage < 3 else _loss(model))
    optimizer.step()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            read = safe_get_full_fp32_param(parameter)
            value = torch.arange(read.numel(), dtype=torch.float32, device=read.device).view(read.shape) / 7 + 0.1
            assert torch.equal(read, value), name


def _loss(model: Any) -> torch.Tensor:
    from torch.nn import functional as F

    return F.cross_entropy(model(models.tokens()).float(), models.tokens().roll(1))


KINDS = [
    *((stage, "no", "none") for stage in (0, 1, 2, 3)),
    *((stage, "bf16", "none") for stage in (0, 1, 3)),
    *((0, "fp16", "none"), (2, "fp16", "cpu"), (3, "bf16", "cpu"), (3, "no", "nvme")),
]
MORE = [
    *((stage, precision, "cpu") for stage in (1, 2, 3) for precision in DTYPES),
    *((stage, precision, "none") for stage in (1, 2, 3) for precision in DTYPES),
    *((3, precision, "nvme") for precision in DTYPES),
]
ALL = [*KINDS, *(pytest.param(*kind, marks=pytest.mark.full) for kind in MORE if kind not in KINDS)]


@pytest.mark.parametrize(("stage", "precision", "offload"), ALL)
def test_whole_values(ranks: RankPool, tmp_path: Any, stage: int, precision: str, offload: str) -> None:
    ranks.run(_whole, stage=stage, precision=precision, offload=offload, path=str(tmp_path))


def _parts(precision: str, offload: str, path: str) -> None:
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    running, model, _ = _trained(3, precision, offload, path)
    rank, kept = running.process_index, {}
    for name, parameter in model.module.named_parameters():
        if not parameter.requires_grad:
            assert safe_get_local_fp32_param(parameter) is None
            continue
        part = safe_get_local_fp32_param(parameter)
        size, whole = part.numel(), safe_get_full_fp32_param(parameter).flatten()
        own = whole[size * rank : size * (rank + 1)].to(part.device)
        assert torch.equal(part[: own.numel()], own), name
        kept[name] = part[: own.numel()], own.clone()  # what pads it may be anything
        new = torch.full((size,), rank + 1.5, device=part.device)
        safe_set_local_fp32_param(parameter, new)
        safe_set_local_optimizer_state(parameter, new, "exp_avg")
        assert torch.equal(safe_get_local_fp32_param(parameter), new)
        assert torch.equal(safe_get_local_optimizer_state(parameter, "exp_avg"), new)
        whole = safe_get_full_fp32_param(parameter).flatten().cpu()
        assert torch.equal(whole, torch.tensor([1.5 + (place >= size) for place in range(whole.numel())])), name
        assert torch.equal(models.whole(model)[name].flatten(), whole.to(parameter.dtype)), name
        with pytest.raises(ConfigError, match="elements"):
            safe_set_local_fp32_param(parameter, torch.zeros(size + 1))
    for name, (part, copy) in kept.items():  # not overwritten by what was read since
        assert torch.equal(part, copy), name


@pytest.mark.parametrize(("precision", "offload"), [("no", "none"), ("bf16", "cpu"), ("bf16", "nvme")])
def test_parts_of_a_rank(ranks: RankPool, tmp_path: Any, precision: str, offload: str) -> None:
    ranks.run(_parts, precision=precision, offload=offload, path=str(tmp_path))


def _refused(stage: int) -> list[str]:
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    _, model, _ = models.trained(stage, steps=0)
    module, told = model.module, []
    for act in (
        lambda: safe_get_full_optimizer_state(module.hidden.weight, "exp_avg"),
        lambda: safe_set_full_optimizer_state(module.hidden.weight, torch.zeros(7, 7), "nothing"),
        lambda: safe_set_full_fp32_param(module.frozen.weight, torch.zeros(7, 7)),
        lambda: safe_set_full_fp32_param(module.hidden.weight, torch.zeros(6, 7)),
    ):
        with pytest.raises((UsageError, ConfigError)) as caught:
            act()
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_cannot_be_is_refused_on_all_ranks(ranks: RankPool, stage: int) -> None:
    for told in ranks.run(_refused, stage=stage):
        assert "has no state 'exp_avg': there is none before the first optimizer step" in told[0]
        assert "has no state 'nothing'" in told[1]
        assert "frozen" in told[2]
        assert "gathered_parameters(parameter, modify=True)" in told[2]
        assert "(6, 7), the parameter (7, 7)" in told[3]
