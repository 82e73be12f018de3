"""What a config becomes: one table of rules that turns every `"auto"` into a number, with source and reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zeroaccel.config import checks
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.errors import ConfigError

if TYPE_CHECKING:
    from zeroaccel.config.plugin import DeepSpeedPlugin

# DeepSpeed's own defaults, which were measured to be about twice as fast as hidden_size^2 on an H200
# (benchmarks/README.md).
FAST_FLOORS = {
    "zero_optimization.reduce_bucket_size": 500_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class LoaderFact:
    """One loader: batch size as the script wrote it (None: unknown), and whether it is for training."""

    batch_size: int | None
    training: bool


@dataclass(frozen=True)
class ModelFact:
    """The model: parameters in all, of the largest one, and the hidden size with where it was found."""

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
        model, optimizer, scheduler: of this call.
    """

    world_size: int
    split_batches: bool = False
    accumulation_steps: int | None = None
    accumulation_typed: bool = False
    loaders: tuple[LoaderFact, ...] = ()
    known_micro_batch_size: int | None = None
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
        was_auto: whether `"auto"` (or nothing) stood there.
    """

    key: str
    value: object
    source: str
    reason: str = ""
    was_auto: bool = False


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


@dataclass
class _Resolution:
    """The config while it is being resolved; problems are collected and raised together."""

    document: HfDeepSpeedConfig
    facts: Facts
    policy: str
    is_train_batch_min: bool
    chosen: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def number(self, key: str) -> Any:
        return self.document.get_value(key)

    def is_open(self, key: str) -> bool:
        return bool(self.number(key) == "auto")

    def choose(self, key: str, value: Any, source: str, reason: str) -> None:
        node, name = self.document.find_config_node(key)
        assert node is not None
        node[name] = value
        self.chosen[key] = Entry(key, value, source, reason, was_auto=True)


Choice = tuple[Any, str, str]  # value, source, reason
Rule = Callable[[_Resolution], Choice | None]


def _accumulation(r: _Resolution) -> Choice:
    steps = r.facts.accumulation_steps or 1
    if r.facts.accumulation_typed:
        return steps, "Accelerator", "gradient_accumulation_steps of the Accelerator"
    return (
        steps,
        "rule",
        "nobody asked for accumulation" if steps == 1 else "of an earlier prepare() or the launcher",
    )


def _clipping(r: _Resolution) -> Choice:
    if r.policy == "accelerate":
        return 1.0, "rule", "Accelerate's default"
    return 0.0, "rule", "nobody asked for clipping; clip_grad_norm_ clips where it is called"


def _hidden_squared(r: _Resolution) -> tuple[int, str] | None:
    model = r.facts.model
    if model is None:
        return None
    if model.hidden_size is not None:
        return model.hidden_size**2, f"hidden size {model.hidden_size} ({model.hidden_size_origin})"
    return (
        model.largest_parameter,
        f"largest parameter {model.largest_parameter}, the model tells no hidden size",
    )


def _bucket(key: str, formula: Callable[[int], int], words: str) -> Rule:
    def rule(r: _Resolution) -> Choice | None:
        squared = _hidden_squared(r)
        if squared is None or r.facts.model is None:
            return None
        value, reason = formula(squared[0]), f"{words}, {squared[1]}"
        if r.policy == "accelerate":
            return value, "rule", reason
        floor = min(FAST_FLOORS[key], max(r.facts.model.numel, 1))
        if value >= floor:
            return value, "rule", reason
        return (
            floor,
            "rule",
            f"{FAST_FLOORS[key]:.0e} is fast, bounded by the model's size; {words} is {value}",
        )

    return rule


def _saving(r: _Resolution) -> Choice:
    return False, "rule", "zero3_save_16bit_model was not asked for"


def _warmup_min_lr(r: _Resolution) -> Choice | None:
    return (0, "rule", "warm-up starts at 0") if _dummy_scheduler(r) else None


def _warmup_max_lr(r: _Resolution) -> Choice | None:
    scheduler = _dummy_scheduler(r)
    if scheduler is None or scheduler.max_lr is None:
        return None
    return scheduler.max_lr, "DummyScheduler", "learning rate of its optimizer"


def _per_rank(r: _Resolution, steps: int) -> tuple[int, str]:
    if r.facts.split_batches or r.facts.world_size == 1:
        return steps, f"{steps} steps"
    return math.ceil(steps / r.facts.world_size), f"{steps} steps of one process / {r.facts.world_size} ranks"


def _warmup_num_steps(r: _Resolution) -> Choice | None:
    scheduler = _dummy_scheduler(r)
    if scheduler is None:
        return None
    if r.policy == "accelerate":
        return max(1, scheduler.warmup_num_steps), "DummyScheduler", "not divided, as in Accelerate"
    steps, reason = _per_rank(r, scheduler.warmup_num_steps)
    return max(1, steps), "DummyScheduler", reason  # DeepSpeed rejects 0


def _total_num_steps(r: _Resolution) -> Choice | None:
    scheduler = _dummy_scheduler(r)
    if scheduler is None or scheduler.total_num_steps is None:
        return None
    steps, reason = _per_rank(r, scheduler.total_num_steps)
    return steps, "DummyScheduler", reason


def _dummy_scheduler(r: _Resolution) -> SchedulerFact | None:
    scheduler = r.facts.scheduler
    return scheduler if scheduler is not None and scheduler.dummy and not scheduler.has_callable else None


def _micro_batch(r: _Resolution) -> Choice | None:
    loaders, world_size = r.facts.loaders, r.facts.world_size
    if not loaders:
        known = r.facts.known_micro_batch_size
        if known is not None:
            return known, "earlier prepare()", "no loader in this call"
        return _from_train_batch(r)
    deciding = [loader for loader in loaders if loader.training] if r.is_train_batch_min else list(loaders)
    sizes = [loader.batch_size for loader in deciding or loaders]
    if any(size is None for size in sizes):
        return None
    per_rank = [size // world_size if r.facts.split_batches else size for size in sizes if size is not None]
    size = min(per_rank) if r.is_train_batch_min else max(per_rank)
    which = f"{'smallest' if r.is_train_batch_min else 'largest'} of {sizes}" if len(sizes) > 1 else f"{sizes[0]}"
    split = f", split over {world_size} ranks" if r.facts.split_batches else ""
    return size, "DataLoader", f"batch size {which}{split}"


def _from_train_batch(r: _Resolution) -> Choice | None:
    total, steps = r.number("train_batch_size"), r.number("gradient_accumulation_steps")
    if not isinstance(total, int) or not isinstance(steps, int):
        return None
    size, rest = divmod(total, steps * r.facts.world_size)
    return None if rest else (size, "train_batch_size", f"{total} / {steps} steps / {r.facts.world_size} ranks")


def _train_batch(r: _Resolution) -> Choice | None:
    size, steps = r.number("train_micro_batch_size_per_gpu"), r.number("gradient_accumulation_steps")
    if not isinstance(size, int) or not isinstance(steps, int):
        return None
    total = size * steps * r.facts.world_size
    return total, "rule", f"{size} (micro-batch) x {steps} (accumulation) x {r.facts.world_size} (ranks)"


def _off(r: _Resolution) -> Choice:
    return False, "rule", "no mixed precision was asked for"


# Every `"auto"` that this library serves. In this order: batch sizes build on the accumulation.
RULES: dict[str, Rule] = {
    "gradient_accumulation_steps": _accumulation,
    "train_micro_batch_size_per_gpu": _micro_batch,
    "train_batch_size": _train_batch,
    "gradient_clipping": _clipping,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _saving,
    "zero_optimization.reduce_bucket_size": _bucket(
        "zero_optimization.reduce_bucket_size", lambda squared: squared, "hidden size squared"
    ),
    "zero_optimization.stage3_prefetch_bucket_size": _bucket(
        "zero_optimization.stage3_prefetch_bucket_size",
        lambda squared: int(0.9 * squared),
        "0.9 x hidden size squared",
    ),
    "zero_optimization.stage3_param_persistence_threshold": _bucket(
        "zero_optimization.stage3_param_persistence_threshold",
        lambda squared: 10 * math.isqrt(squared),
        "10 x hidden size",
    ),
    "scheduler.params.warmup_min_lr": _warmup_min_lr,
    "scheduler.params.warmup_max_lr": _warmup_max_lr,
    "scheduler.params.warmup_num_steps": _warmup_num_steps,
    "scheduler.params.total_num_steps": _total_num_steps,
    "fp16.enabled": _off,
    "bf16.enabled": _off,
}

# DeepSpeed fills these itself.
LEFT_TO_DEEPSPEED = ("zero_optimization.zenflow.",)


def resolve(plugin: DeepSpeedPlugin, facts: Facts) -> ResolvedConfig:
    """Turns the plugin's config into the one that DeepSpeed gets. The plugin is left as it is.

    Raises:
        ConfigError: everything that cannot be, at once.
    """
    r = _Resolution(HfDeepSpeedConfig(plugin.intent()), facts, plugin.auto_policy, plugin.is_train_batch_min)
    config = r.document.config
    r.problems += checks.optimizer_and_scheduler(config, facts.optimizer, facts.scheduler)
    _drop_unused_sections(config, facts)
    if facts.optimizer is not None and not facts.optimizer.dummy:
        config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("train_micro_batch_size_per_gpu", "auto")
    for key, rule in RULES.items():
        if r.is_open(key) and (choice := rule(r)) is not None:
            r.choose(key, *choice)
    _fill_from_dummies(r)
    r.problems += checks.batch_arithmetic(r.document, facts, plugin.source_of, r.chosen)
    r.problems += _left_over(r)
    r.problems += checks.values(r.document)
    r.warnings += checks.inert_settings(r.document)
    r.warnings += _losers(r, plugin)
    if r.problems:
        raise ConfigError.join(r.problems)
    return ResolvedConfig(config, tuple(_entries(r, plugin)), tuple(r.warnings))


def _drop_unused_sections(config: dict[str, Any], facts: Facts) -> None:
    """A model that is prepared alone, for inference, has no use for the optimizer and scheduler of the config."""
    if facts.optimizer is None:
        config.pop("optimizer", None)
    if facts.optimizer is None and facts.scheduler is None:
        config.pop("scheduler", None)


def _fill_from_dummies(r: _Resolution) -> None:
    for section, fact in (("optimizer", r.facts.optimizer), ("scheduler", r.facts.scheduler)):
        if fact is None or not fact.dummy:
            continue
        for name, value in fact.params.items():
            key = f"{section}.params.{name}"
            if r.is_open(key):
                r.choose(key, value, f"Dummy{'Optim' if section == 'optimizer' else 'Scheduler'}", f"its {name}")


def _left_over(r: _Resolution) -> list[str]:
    problems = []
    for key, value in leaves(r.document.config):
        if value != "auto" or key.startswith(LEFT_TO_DEEPSPEED):
            continue
        problems.append(checks.unserved(key, RULES, r.facts))
    return problems


def _losers(r: _Resolution, plugin: DeepSpeedPlugin) -> list[str]:
    steps, asked = r.number("gradient_accumulation_steps"), r.facts.accumulation_steps
    if r.facts.accumulation_typed and isinstance(steps, int) and asked != steps:
        source = plugin.source_of("gradient_accumulation_steps")
        return [f"gradient_accumulation_steps: {steps} ({source}) holds, not {asked} (Accelerator)"]
    return []


def _entries(r: _Resolution, plugin: DeepSpeedPlugin) -> Iterator[Entry]:
    for key, value in leaves(r.document.config):
        yield r.chosen.get(key) or Entry(key, copy.copy(value), plugin.source_of(key))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested config."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
