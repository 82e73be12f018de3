"""What `prepare()` knows, and what becomes of a config: the frozen values that pass between the rooms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class LoaderFact:
    """One loader: batch size as the script wrote it (None: unknown), and whether it is for training."""

    batch_size: int | None
    training: bool


@dataclass(frozen=True)
class ModelFact:
    """The model: parameters in all, of the largest one (0: unknown), and the hidden size with where it was found."""

    numel: int
    largest_parameter: int
    hidden_size: int | None
    hidden_size_origin: str


@dataclass(frozen=True)
class OptimizerFact:
    """The optimizer: a `DummyOptim` with its values, or the name of a real one."""

    dummy: bool
    name: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class SchedulerFact:
    """The scheduler: a `DummyScheduler` with its values, or the name of a real one."""

    dummy: bool
    has_callable: bool
    name: str
    total_num_steps: int | None
    warmup_num_steps: int
    max_lr: float | None
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known at `prepare()`.

    Attributes:
        world_size: number of ranks.
        split_batches: a loader's batch size is that of all ranks together.
        accumulation_steps: what the `Accelerator` says.
        accumulation_typed: whether the script typed that number.
        loaders: of this `prepare()` call.
        known_micro_batch_size: of an earlier call.
        implicit_plugin: nobody asked for DeepSpeed; it runs because there are several ranks.
        model, optimizer, scheduler: of this call.
    """

    world_size: int
    split_batches: bool = False
    accumulation_steps: int | None = None
    accumulation_typed: bool = False
    loaders: tuple[LoaderFact, ...] = ()
    known_micro_batch_size: int | None = None
    implicit_plugin: bool = False
    model: ModelFact | None = None
    optimizer: OptimizerFact | None = None
    scheduler: SchedulerFact | None = None


@dataclass(frozen=True)
class Entry:
    """One value of the resolved config.

    Attributes:
        key: dotted.
        value: what runs.
        source: who said so.
        reason: why, for values that a rule chose.
    """

    key: str
    value: object
    source: str
    reason: str = ""


@dataclass(frozen=True)
class ResolvedConfig:
    """The config that DeepSpeed gets.

    Attributes:
        config: the dictionary, free of `"auto"`.
        entries: every value with its source.
        warnings: values that were given twice and lost.
    """

    config: dict[str, Any]
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()

    def assigned(self, values: dict[str, Any], reason: str) -> ResolvedConfig:
        """The same with values (of top-level keys) that the script assigned afterwards."""
        entries = tuple(
            replace(entry, value=values[entry.key], source="the script", reason=reason)
            if entry.key in values and entry.value != values[entry.key]
            else entry
            for entry in self.entries
        )
        return replace(self, config={**self.config, **values}, entries=entries)

    def table(self) -> str:
        """The entries as text, one a line."""
        rows = [("key", "value", "source", "reason")]
        rows += [(entry.key, str(entry.value), entry.source, entry.reason) for entry in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = (
            "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)
