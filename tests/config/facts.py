"""Plugins and facts for the tests of this room."""

from __future__ import annotations

from typing import Any

from zeroaccel.config.facts import Facts, LoaderFact, ModelFact, OptimizerFact, SchedulerFact
from zeroaccel.config.plugin import DeepSpeedPlugin

TRAINING = LoaderFact(4, training=True)
EVALUATION = LoaderFact(2, training=False)
REAL = OptimizerFact(dummy=False, name="SGD", params={})
DUMMY = OptimizerFact(dummy=True, name="DummyOptim", params={"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)})
MODEL = ModelFact(numel=1_000_000, largest_parameter=90_000, hidden_size=100, hidden_size_origin="model.config")


def scheduler(dummy: bool = True, has_callable: bool = False, **values: Any) -> SchedulerFact:
    """A scheduler of 100 steps, 10 of them warm-up."""
    facts: dict[str, Any] = {"total_num_steps": 100, "warmup_num_steps": 10, "max_lr": 0.01, "params": {}, **values}
    return SchedulerFact(dummy, has_callable, "DummyScheduler" if dummy else "LambdaLR", **facts)


def facts(**values: Any) -> Facts:
    """One rank with a model, a real optimizer and a training loader of batch size 4."""
    usual: dict[str, Any] = {"world_size": 1, "loaders": (TRAINING,), "model": MODEL, "optimizer": REAL}
    return Facts(**{**usual, **values})


def plugin(zero: dict[str, Any] | None = None, policy: str = "fast", **top_level: Any) -> DeepSpeedPlugin:
    """A plugin from a dictionary, ZeRO stage 2."""
    made = DeepSpeedPlugin({"zero_optimization": {"stage": 2, **(zero or {})}, **top_level}, auto_policy=policy)
    made.set_mixed_precision("no")
    return made
