"""stdout is the script's: neither `prepare()` nor a loop prints, and the log has one summary on rank 0."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import SGD, AdamW

from tests.distributed.pool import RankPool
from tests.engine.small import FEATURES, accelerator, loader, net, train_step
from zeroaccel.engine.scheduler import DummyScheduler


def train_everywhere() -> None:
    warm_up: dict[str, Any] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4}}
    for stage, offload, precision in ((0, "none", "no"), (1, "none", "bf16"), (2, "cpu", "fp16"), (3, "cpu", "bf16")):
        zero = {"stage": stage, "offload_optimizer": {"device": offload}}
        prepared = accelerator(
            {"zero_optimization": zero, "scheduler": warm_up}, {"mixed_precision": precision}, cast_inputs=True
        )
        model = net()
        optimizer = (AdamW if stage == 2 else SGD)(model.parameters(), lr=0.1)
        engine, sharded, _, _ = prepared.prepare(model, optimizer, DummyScheduler(optimizer), loader())
        for _ in range(2):
            train_step(prepared, engine, sharded, torch.ones(2, FEATURES))
        prepared.clip_grad_norm_(engine.parameters(), 1.0)
        prepared.free_memory()


def start() -> None:
    accelerator()


def test_nothing_is_printed(ranks: RankPool) -> None:
    ranks.run(start)
    before = len(ranks.output())
    ranks.run(train_everywhere)
    assert ranks.output()[before:] == ""
    assert "built successfully" not in ranks.output()  # DeepSpeed at the first prepare() of a process


class Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged() -> list[str]:
    handler, library = Collecting(), logging.getLogger("zeroaccel")
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        prepared = accelerator(zero_stage=2, gradient_clipping=0.5, gradient_accumulation_steps=3)
        model = net()
        prepared.prepare(model, AdamW(model.parameters()), loader())
        prepared.free_memory()
    finally:
        library.removeHandler(handler)
        library.setLevel(logging.NOTSET)
    return handler.lines


def test_one_summary_on_rank_0_says_what_runs(ranks: RankPool) -> None:
    first, second = ranks.run(logged)
    assert first == ["ZeRO stage 2, float32, AdamW: micro-batch 4 x accumulation 3 x ranks 2 = 24; clips at 0.5"]
    assert second == []


def warned() -> None:
    """DeepSpeed's other warnings still come, on stderr."""
    import sys

    from deepspeed.utils import logger

    accelerator(zero_stage=2)
    assert {handler.stream for handler in logger.handlers if isinstance(handler, logging.StreamHandler)} == {sys.stderr}
    logger.warning("something that matters")


def test_warnings_that_matter_are_kept(ranks: RankPool) -> None:
    ranks.run(warned)
    assert ranks.output().count("something that matters") >= 2
