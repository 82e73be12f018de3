"""What a config becomes: one table of rules that turns every `"auto"` into a number, with source and reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from zeroaccel.config import checks
from zeroaccel.config.document import HfDeepSpeedConfig, Problem, assign, leaves
from zeroaccel.config.facts import Entry, Facts, ResolvedConfig, SchedulerFact
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.precedence import FIELD_KEYS, Level, Said, settle
from zeroaccel.errors import ConfigError

# DeepSpeed's own defaults: a step took 0.62 (stage 2) and 0.81 (stage 3) of the time that hidden_size^2 and its like
# cost (benchmarks/README.md).
FAST_FLOORS = {
    "zero_optimization.reduce_bucket_size": 500_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
}


@dataclass
class _Resolution:
    """The config while it is being resolved; problems are collected and raised together."""

    document: HfDeepSpeedConfig
    facts: Facts
    policy: str
    is_train_batch_min: bool
    chosen: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def number(self, key: str) -> Any:
        return self.document.get_value(key)

    def is_open(self, key: str) -> bool:
        return bool(self.number(key) == "auto")

    def choose(self, key: str, value: Any, source: str, reason: str) -> None:
        assign(self.document.config, key, value)
        self.chosen[key] = Entry(key, value, source, reason)


Choice = tuple[Any, str, str]  # value, source, reason
Rule = Callable[[_Resolution], Choice | None]


def _accumulation(r: _Resolution) -> Choice:
    steps = r.facts.accumulation_steps or 1
    if r.facts.accumulation_typed:
        return steps, "Accelerator", "gradient_accumulation_steps of the Accelerator"
    return steps, "rule", "nobody asked for accumulation" if steps == 1 else "of an earlier prepare() or the launcher"


def _clipping(r: _Resolution) -> Choice:
    if r.policy == "accelerate":
        return 1.0, "rule", "Accelerate's default"
    return 0.0, "rule", "nobody asked for clipping; clip_grad_norm_ clips where it is called"


def _hidden_size(r: _Resolution) -> tuple[int, str] | None:
    model = r.facts.model
    if model is None:
        return None
    if model.hidden_size is not None:
        return model.hidden_size, f"hidden size {model.hidden_size} ({model.hidden_size_origin})"
    if not model.largest_parameter:
        return None
    size = math.isqrt(max(model.largest_parameter - 1, 0)) + 1
    return size, f"hidden size {size} (square root of the largest parameter, the model tells none)"


def _bucket(key: str, formula: Callable[[int], float], words: str) -> Rule:
    def rule(r: _Resolution) -> Choice | None:
        hidden = _hidden_size(r)
        if hidden is None or r.facts.model is None:
            return None
        size, origin = hidden
        value = int(formula(size))
        floor = min(FAST_FLOORS[key], max(r.facts.model.numel, 1))
        if r.policy == "accelerate" or value >= floor:
            return value, "rule", f"{words}, {origin}"
        return floor, "rule", f"{FAST_FLOORS[key]:.0e} is fast, bounded by the model's size; {words} is {value}"

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
        if r.facts.model is not None and r.facts.optimizer is None:
            return _from_train_batch(r) or (1, "rule", "a model without an optimizer, which any batch size fits")
        if r.facts.implicit_plugin:
            return 1, "rule", "nobody configured DeepSpeed, and no loader tells the batch size"
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
        "zero_optimization.reduce_bucket_size", lambda hidden: hidden * hidden, "hidden size squared"
    ),
    "zero_optimization.stage3_prefetch_bucket_size": _bucket(
        "zero_optimization.stage3_prefetch_bucket_size",
        lambda hidden: 0.9 * hidden * hidden,
        "0.9 x hidden size squared",
    ),
    "zero_optimization.stage3_param_persistence_threshold": _bucket(
        "zero_optimization.stage3_param_persistence_threshold",
        lambda hidden: 10 * hidden,
        "10 x hidden size",
    ),
    "scheduler.params.warmup_min_lr": _warmup_min_lr,
    "scheduler.params.warmup_max_lr": _warmup_max_lr,
    "scheduler.params.warmup_num_steps": _warmup_num_steps,
    "scheduler.params.total_num_steps": _total_num_steps,
    "fp16.enabled": _off,
    "bf16.enabled": _off,
}

# What only the script's prepare() can tell, for `foresee`; everything below a key that ends with a dot.
TOLD_AT_PREPARE = {
    "train_micro_batch_size_per_gpu": "batch size of the DataLoader",
    "train_batch_size": "micro-batch x accumulation x ranks",
    "zero_optimization.reduce_bucket_size": "hidden size and number of parameters of the model",
    "zero_optimization.stage3_prefetch_bucket_size": "hidden size and number of parameters of the model",
    "zero_optimization.stage3_param_persistence_threshold": "hidden size and number of parameters of the model",
    "optimizer.params.": "the script's DummyOptim",
    "scheduler.params.": "the script's DummyScheduler",
}

# DeepSpeed fills these itself.
LEFT_TO_DEEPSPEED = ("zero_optimization.zenflow.", "data_types.keep_in_fp32_modules", "pipeline.stages")


def resolve(plugin: DeepSpeedPlugin, facts: Facts) -> ResolvedConfig:
    """Turns the plugin's config into the one that DeepSpeed gets. The plugin is left as it is.

    Raises:
        ConfigError: everything that cannot be, at once.
    """
    r = _apply_rules(plugin, facts)
    r.problems += _left_over(r)
    return _finish(r, plugin)


def foresee(plugin: DeepSpeedPlugin, facts: Facts) -> ResolvedConfig:
    """The same before `prepare()`: what only the script can tell then stays `"auto"`, with an entry that says so.

    Raises:
        ConfigError: everything that cannot be whatever the script does, at once.
    """
    r = _apply_rules(plugin, facts)
    for key, value in leaves(r.document.config):
        if value == "auto" and (reason := _told_at_prepare(key)) is not None:
            r.chosen[key] = Entry(key, value, "prepare()", reason)
    r.problems += [problem for problem in _left_over(r) if problem.key not in r.chosen]
    return _finish(r, plugin)


def is_served(key: str) -> bool:
    """Whether something fills an `"auto"` at this key: a rule, the plugin's fields, the script, or DeepSpeed."""
    known = key in RULES or key in FIELD_KEYS.values() or key.startswith(LEFT_TO_DEEPSPEED)
    return known or _told_at_prepare(key) is not None


def _told_at_prepare(key: str) -> str | None:
    section = f"{key.rpartition('.')[0]}."
    return TOLD_AT_PREPARE.get(key, TOLD_AT_PREPARE.get(section))


def _apply_rules(plugin: DeepSpeedPlugin, facts: Facts) -> _Resolution:
    r = _Resolution(HfDeepSpeedConfig(plugin.intent()), facts, plugin.auto_policy, plugin.is_train_batch_min)
    config = r.document.config
    r.problems += checks.optimizer_and_scheduler(config, facts.optimizer, facts.scheduler)
    _drop_unused_sections(config, facts)
    if facts.optimizer is not None and not facts.optimizer.dummy:
        _allow_untested(r, plugin)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        if config.get(key) is None:
            config[key] = "auto"
    for key, rule in RULES.items():
        if r.is_open(key) and (choice := rule(r)) is not None:
            r.choose(key, *choice)
    _fill_from_dummies(r)
    r.problems += checks.batch_arithmetic(r.document, facts, plugin.source_of, r.chosen)
    return r


def _finish(r: _Resolution, plugin: DeepSpeedPlugin) -> ResolvedConfig:
    """The result, without what DeepSpeed must not see.

    Raises:
        ConfigError: all problems.
    """
    r.problems += checks.values(r.document)
    r.warnings += checks.inert_settings(r.document)
    r.warnings += _losers(r, plugin)
    if r.problems:
        raise ConfigError.join(r.problems)
    _keep_from_deepspeed(r)
    return ResolvedConfig(r.document.config, tuple(_entries(r, plugin)), tuple(r.warnings))


def _drop_unused_sections(config: dict[str, Any], facts: Facts) -> None:
    """A model that is prepared alone, for inference, has no use for the optimizer and scheduler of the config."""
    if facts.optimizer is None:
        config.pop("optimizer", None)
    if facts.optimizer is None and facts.scheduler is None:
        config.pop("scheduler", None)


def _allow_untested(r: _Resolution, plugin: DeepSpeedPlugin) -> None:
    """DeepSpeed takes optimizers of the script's own only with its leave."""
    key, needed = "zero_allow_untested_optimizer", "the optimizer is the script's own"
    if r.number(key) is False:
        r.warnings.append(f"{key}: True (rule: {needed}) holds, not False ({plugin.source_of(key)})")
    if r.number(key) is not True:
        r.choose(key, True, "rule", needed)


def _keep_from_deepspeed(r: _Resolution) -> None:
    """Takes out what DeepSpeed would follow where it must not, and switches off a check of its own."""
    if r.number("zero_optimization.stage") in (0, None):
        # It offloads nothing at stage 0, but would ask for an optimizer on the CPU all the same.
        r.document.del_config_sub_tree("zero_optimization.offload_optimizer")
    if not r.number("fp16.enabled"):  # else it casts inputs of fp32 and bf16 models, too
        r.document.del_config_sub_tree("fp16.auto_cast")
    own = r.facts.optimizer is not None and not r.facts.optimizer.dummy
    offloaded = r.number("zero_optimization.offload_optimizer.device") not in (None, "none")
    key = "zero_force_ds_cpu_optimizer"
    if own and offloaded and r.number(key) is not False:
        r.choose(key, False, "rule", "the optimizer is chosen here; DeepSpeed's check refuses even its own CPU Adagrad")


def _fill_from_dummies(r: _Resolution) -> None:
    for section, fact in (("optimizer", r.facts.optimizer), ("scheduler", r.facts.scheduler)):
        if fact is None or not fact.dummy:
            continue
        for name, value in fact.params.items():
            key = f"{section}.params.{name}"
            if r.is_open(key):
                r.choose(key, value, f"Dummy{'Optim' if section == 'optimizer' else 'Scheduler'}", f"its {name}")


def _left_over(r: _Resolution) -> list[Problem]:
    return [
        checks.unserved(key, RULES, r.facts)
        for key, value in leaves(r.document.config)
        if value == "auto" and not key.startswith(LEFT_TO_DEEPSPEED)
    ]


def _losers(r: _Resolution, plugin: DeepSpeedPlugin) -> list[str]:
    """Numbers of the config that the script gives too, and differently."""
    script = {}
    if r.facts.accumulation_typed:
        script["gradient_accumulation_steps"] = (r.facts.accumulation_steps, "Accelerator")
    if r.facts.loaders and (choice := _micro_batch(r)) is not None:
        script["train_micro_batch_size_per_gpu"] = (choice[0], f"{choice[1]}, {choice[2]}")
    losers = []
    for key, (value, source) in script.items():
        if key not in r.chosen:
            held = Said(r.number(key), Level.DOCUMENT, plugin.source_of(key))
            losers += settle(key, [held, Said(value, Level.ACCELERATOR, source)])[1]
    return losers


def _entries(r: _Resolution, plugin: DeepSpeedPlugin) -> Iterator[Entry]:
    for key, value in leaves(r.document.config):
        yield r.chosen.get(key) or Entry(key, copy.copy(value), plugin.source_of(key), plugin.reason_of(key))
