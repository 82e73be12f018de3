"""Rules between the values of a config. Each returns its problems as text, so that all are told at once."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.facts import Entry, Facts, OptimizerFact, SchedulerFact

STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu", "nvme", None)
SECTIONS = ("fp16", "bf16", "optimizer", "scheduler", "zero_optimization")


def sections(config: Mapping[str, Any], origin: str) -> list[str]:
    """Sections that are missing, or no sections."""
    problems = []
    if "zero_optimization" not in config:
        problems.append(
            f"the DeepSpeed config ({origin}) has no zero_optimization section: add one, e.g."
            ' "zero_optimization": {"stage": 2}'
        )
    for name in SECTIONS:
        if not isinstance(value := config.get(name, {}), dict):
            problems.append(f"{name} is {value!r} ({origin}): write a section, {{...}}, or leave it out")
    return problems


def optimizer_and_scheduler(
    config: Mapping[str, Any], optimizer: OptimizerFact | None, scheduler: SchedulerFact | None
) -> list[str]:
    """Who brings optimizer and scheduler: the config with dummies in the code, or the code alone."""
    problems = []
    if optimizer is not None and "optimizer" in config and not optimizer.dummy:
        problems.append(
            f"the DeepSpeed config has an optimizer section and the code a {optimizer.name}: remove the section, or use"
            " zeroaccel.utils.DummyOptim in the code"
        )
    if optimizer is not None and optimizer.dummy and "optimizer" not in config:
        problems.append(
            "the code has a DummyOptim and the DeepSpeed config no optimizer section: add one, or use a torch.optim"
            " optimizer in the code"
        )
    if scheduler is None:
        return problems
    if "scheduler" in config and not scheduler.dummy:
        problems.append(
            f"the DeepSpeed config has a scheduler section and the code a {scheduler.name}: remove the section, or use"
            " zeroaccel.utils.DummyScheduler in the code"
        )
    if "scheduler" in config and scheduler.has_callable:
        problems.append(
            "the DeepSpeed config has a scheduler section and the code a DummyScheduler with lr_scheduler_callable:"
            " remove one of them"
        )
    if "scheduler" not in config and scheduler.dummy and not scheduler.has_callable:
        problems.append(
            "the code has a DummyScheduler and the DeepSpeed config no scheduler section: add one, or pass"
            " DummyScheduler(..., lr_scheduler_callable=function_of_the_optimizer)"
        )
    if optimizer is not None and optimizer.dummy and not scheduler.dummy:
        problems.append(
            f"the code has a DummyOptim and a {scheduler.name}, which cannot drive DeepSpeed's optimizer: use"
            " zeroaccel.utils.DummyScheduler, with lr_scheduler_callable for a scheduler of your own"
        )
    return problems


def batch_arithmetic(
    document: HfDeepSpeedConfig, facts: Facts, source_of: Callable[[str], str], chosen: Mapping[str, Entry]
) -> list[str]:
    """train_batch_size = micro-batch x accumulation x ranks, each at least 1."""
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    numbers = {key: document.get_value(key) for key in keys}
    problems = [
        f"{key} is {value!r} ({source_of(key)}): write a whole number of at least 1, or 'auto'"
        for key, value in numbers.items()
        if value not in ("auto", None)
        and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
        and key not in chosen
    ]
    micro, steps, total = numbers.values()
    if micro == 0 and "train_micro_batch_size_per_gpu" in chosen:
        sizes = [loader.batch_size for loader in facts.loaders]
        problems.append(
            f"split_batches cuts each batch for {facts.world_size} ranks, but the DataLoader's batch size is"
            f" {min(size for size in sizes if size is not None)}: use at least batch_size={facts.world_size}"
        )
    if problems or not all(isinstance(number, int) for number in (micro, steps, total)):
        return problems
    product = micro * steps * facts.world_size
    if total == product:
        return []

    def origin(key: str) -> str:
        entry = chosen.get(key)
        return f"{entry.source}, {entry.reason}" if entry is not None else source_of(key)

    return [
        f"train_batch_size is {total}, but {micro} (micro-batch) x {steps} (accumulation) x {facts.world_size} (ranks)"
        f' = {product}\n  train_batch_size  {source_of("train_batch_size")}        write "auto" or {product}\n'
        f"  micro-batch       {origin('train_micro_batch_size_per_gpu')}\n"
        f"  accumulation      {origin('gradient_accumulation_steps')}"
    ]


def unserved(key: str, served: Container[str], facts: Facts) -> str:
    """What to tell about an `"auto"` that is left over."""
    if key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
        if facts.loaders:
            found = "a DataLoader without a batch size (batch_size=None, or a batch sampler that tells none)"
        else:
            found = "no DataLoader"
        return (
            f"{key} is 'auto', and prepare() got {found}: pass a DataLoader with a batch_size, or write a number, in"
            " the config or by `accelerator.deepspeed_plugin.deepspeed_config['train_micro_batch_size_per_gpu'] = ...`"
        )
    if key.startswith("optimizer.params."):
        name = key.rsplit(".", 1)[-1]
        return f"{key} is 'auto', and the DummyOptim has no {name}: pass DummyOptim(..., {name}=...), or write a value"
    if key.startswith("scheduler.params."):
        if facts.scheduler is None:
            return f"{key} is 'auto', and prepare() got no scheduler: pass a DummyScheduler, or write a value"
        name = key.rsplit(".", 1)[-1]
        remedy = f"pass DummyScheduler(..., {name}=...), or write a value"
        return f"{key} is 'auto', and the DummyScheduler has no {name}: {remedy}"
    if key in served:
        return f"{key} is 'auto', and nothing in this prepare() call tells its value: write one"
    return (
        f"{key} is 'auto', which is not understood there: write a value, or leave the key out for DeepSpeed's default"
    )


def values(document: HfDeepSpeedConfig) -> list[str]:
    """Single values that cannot be."""
    problems = []
    stage = document.get_value("zero_optimization.stage", 0)
    if stage not in STAGES and stage != "auto":
        problems.append(f"zero_optimization.stage is {stage!r}: ZeRO has the stages 0, 1, 2 and 3")
    for part in ("offload_optimizer", "offload_param"):
        device = document.get_value(f"zero_optimization.{part}.device", "none")
        path = document.get_value(f"zero_optimization.{part}.nvme_path")
        if device not in DEVICES and device != "auto":
            problems.append(f"zero_optimization.{part}.device is {device!r}: use 'none', 'cpu' or 'nvme'")
        if device == "nvme" and path in (None, "", "none"):
            problems.append(
                f"zero_optimization.{part}.device is 'nvme' without nvme_path: name a folder on a fast disk"
                f" (DeepSpeedPlugin({part}_nvme_path=...), or nvme_path in the config)"
            )
    clipping = document.get_value("gradient_clipping", 0.0)
    if isinstance(clipping, (int, float)) and clipping < 0:
        problems.append(f"gradient_clipping is {clipping}: use a norm above 0, or 0 for no clipping")
    if all(document.get_value(f"{name}.enabled") is True for name in ("fp16", "bf16")):
        problems.append("fp16.enabled and bf16.enabled are both true: enable one of them")
    return problems


def inert_settings(document: HfDeepSpeedConfig) -> list[str]:
    """Settings that DeepSpeed accepts and does not follow at this stage."""
    warnings = []
    stage = document.get_value("zero_optimization.stage", 0)
    optimizer = document.get_value("zero_optimization.offload_optimizer.device", "none")
    parameters = document.get_value("zero_optimization.offload_param.device", "none")
    if parameters not in (None, "none") and stage != 3:
        warnings.append(
            f"offload_param ({parameters}) works at stage 3 only; at stage {stage} parameters stay where they are"
        )
    if optimizer == "nvme" and stage != 3:
        warnings.append(
            f"offload_optimizer to nvme works at stage 3 only; at stage {stage} DeepSpeed uses CPU memory instead"
        )
    if document.is_true("msamp.enabled"):
        warnings.append("msamp has no effect: MS-AMP would need its own deepspeed.initialize, which is not called here")
    if optimizer not in (None, "none") and stage == 0:
        warnings.append("offload_optimizer needs stage 1 to 3; at stage 0 the optimizer stays on the device")
    return warnings
