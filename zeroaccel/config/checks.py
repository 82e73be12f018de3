"""Rules between the values of a config. Each returns its problems, so that all are told at once."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from zeroaccel.config.document import HfDeepSpeedConfig, Problem
from zeroaccel.config.facts import Entry, Facts, OptimizerFact, SchedulerFact

STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu", "nvme", None)
SECTIONS = ("fp16", "bf16", "optimizer", "scheduler", "zero_optimization")


def sections(config: Mapping[str, Any], origin: str) -> list[Problem]:
    """Sections that are missing, or no sections."""
    problems = []
    if "zero_optimization" not in config:
        problems.append(
            Problem(
                "",
                f"the DeepSpeed config ({origin}) has no zero_optimization section: add one, e.g."
                ' "zero_optimization": {"stage": 2}',
            )
        )
    for name in SECTIONS:
        if not isinstance(value := config.get(name, {}), dict):
            problems.append(Problem(name, f"{name} is {value!r} ({origin}): write a section, {{...}}, or leave it out"))
    return problems


def optimizer_and_scheduler(
    config: Mapping[str, Any], optimizer: OptimizerFact | None, scheduler: SchedulerFact | None
) -> list[Problem]:
    """Who brings optimizer and scheduler: the config with dummies in the code, or the code alone."""
    problems: list[Problem] = []

    def tell(key: str, text: str) -> None:
        problems.append(Problem(key, text))

    if optimizer is not None and "optimizer" in config and not optimizer.dummy:
        tell(
            "optimizer",
            f"the DeepSpeed config has an optimizer section and the code a {optimizer.name}: remove the section, or"
            " use zeroaccel.utils.DummyOptim in the code",
        )
    if optimizer is not None and optimizer.dummy and "optimizer" not in config:
        tell(
            "optimizer",
            "the code has a DummyOptim and the DeepSpeed config no optimizer section: add one, or use a torch.optim"
            " optimizer in the code",
        )
    if scheduler is None:
        return problems
    if "scheduler" in config and not scheduler.dummy:
        tell(
            "scheduler",
            f"the DeepSpeed config has a scheduler section and the code a {scheduler.name}: remove the section, or"
            " use zeroaccel.utils.DummyScheduler in the code",
        )
    if "scheduler" in config and scheduler.has_callable:
        tell(
            "scheduler",
            "the DeepSpeed config has a scheduler section and the code a DummyScheduler with lr_scheduler_callable:"
            " remove one of them",
        )
    if "scheduler" not in config and scheduler.dummy and not scheduler.has_callable:
        tell(
            "scheduler",
            "the code has a DummyScheduler and the DeepSpeed config no scheduler section: add one, or pass"
            " DummyScheduler(..., lr_scheduler_callable=function_of_the_optimizer)",
        )
    if optimizer is not None and optimizer.dummy and not scheduler.dummy:
        tell(
            "optimizer",
            f"the code has a DummyOptim and a {scheduler.name}, which cannot drive DeepSpeed's optimizer: use"
            " zeroaccel.utils.DummyScheduler, with lr_scheduler_callable for a scheduler of your own",
        )
    return problems


def depends_on_the_script(config: Mapping[str, Any]) -> list[Problem]:
    """What works only with the right objects in the script: no problem yet, but worth a word."""
    if "scheduler" not in config or "optimizer" in config:
        return []
    told = "scheduler without an optimizer section: the script must pass an optimizer of its own, and a DummyScheduler"
    return [Problem("scheduler", told)]


BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def whole_numbers(
    document: HfDeepSpeedConfig, source_of: Callable[[str], str], chosen: Container[str] = ()
) -> list[Problem]:
    """Batch sizes and accumulation that are no numbers of at least 1, apart from those that a rule has `chosen`."""
    return [
        Problem(key, f"{key} is {value!r} ({source_of(key)}): write a whole number of at least 1, or 'auto'")
        for key in BATCH
        if (value := document.get_value(key)) not in ("auto", None)
        and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
        and key not in chosen
    ]


def batch_arithmetic(
    document: HfDeepSpeedConfig, facts: Facts, source_of: Callable[[str], str], chosen: Mapping[str, Entry]
) -> list[Problem]:
    """train_batch_size = micro-batch x accumulation x ranks, each at least 1."""
    problems = whole_numbers(document, source_of, chosen)
    micro, steps, total = (document.get_value(key) for key in BATCH)
    if micro == 0 and "train_micro_batch_size_per_gpu" in chosen:
        sizes = [loader.batch_size for loader in facts.loaders]
        problems.append(
            Problem(
                "train_micro_batch_size_per_gpu",
                f"split_batches cuts each batch for {facts.world_size} ranks, but the DataLoader's batch size is"
                f" {min(size for size in sizes if size is not None)}: use at least batch_size={facts.world_size}",
            )
        )
    if problems or not all(isinstance(number, int) for number in (micro, steps, total)):
        return problems
    product = micro * steps * facts.world_size
    if total == product:
        return []

    def origin(key: str) -> str:
        entry = chosen.get(key)
        return f"{entry.source}, {entry.reason}" if entry is not None else source_of(key)

    told = (
        f"train_batch_size is {total}, but {micro} (micro-batch) x {steps} (accumulation) x {facts.world_size} (ranks)"
        f' = {product}\n  train_batch_size  {source_of("train_batch_size")}        write "auto" or {product}\n'
        f"  micro-batch       {origin('train_micro_batch_size_per_gpu')}\n"
        f"  accumulation      {origin('gradient_accumulation_steps')}"
    )
    return [Problem("train_batch_size", told)]


def batch_of_no_world(document: HfDeepSpeedConfig) -> list[Problem]:
    """Numbers whose arithmetic fails on whatever number of ranks."""
    micro, steps, total = (document.get_value(key) for key in BATCH)
    steps = 1 if steps is None else steps
    if (
        not all(isinstance(number, int) and number > 0 for number in (micro, steps, total))
        or total % (micro * steps) == 0
    ):
        return []
    told = f"train_batch_size is {total}, no multiple of {micro} (micro-batch) x {steps} (accumulation): write 'auto'"
    return [Problem("train_batch_size", told)]


def unserved(key: str, served: Container[str], facts: Facts) -> Problem:
    """What to tell about an `"auto"` that is left over."""
    return Problem(key, _why_unserved(key, served, facts))


def _why_unserved(key: str, served: Container[str], facts: Facts) -> str:
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


def values(document: HfDeepSpeedConfig) -> list[Problem]:
    """Single values that cannot be, and pairs that exclude each other."""
    problems = []
    stage = document.get_value("zero_optimization.stage", 0)
    if stage not in STAGES and stage != "auto":
        problems.append(
            Problem(
                "zero_optimization.stage", f"zero_optimization.stage is {stage!r}: ZeRO has the stages 0, 1, 2 and 3"
            )
        )
    for part in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{part}.device"
        device = document.get_value(key, "none")
        path = document.get_value(f"zero_optimization.{part}.nvme_path")
        if device not in DEVICES and device != "auto":
            problems.append(Problem(key, f"{key} is {device!r}: use 'none', 'cpu' or 'nvme'"))
        if device == "nvme" and path in (None, "", "none"):
            told = (
                f"{key} is 'nvme' without nvme_path: name a folder on a fast disk"
                f" (--{part}_nvme_path, DeepSpeedPlugin({part}_nvme_path=...), or nvme_path in the config)"
            )
            problems.append(Problem(key, told))
    clipping = document.get_value("gradient_clipping", 0.0)
    if isinstance(clipping, (int, float)) and clipping < 0:
        told = f"gradient_clipping is {clipping}: use a norm above 0, or 0 for no clipping"
        problems.append(Problem("gradient_clipping", told))
    if document.get_value("managed_gradient_accumulation") is False:
        told = "managed_gradient_accumulation is False: optimizer.step() decides here what a window is; leave it out"
        problems.append(Problem("managed_gradient_accumulation", told))
    if all(document.get_value(f"{name}.enabled") is True for name in ("fp16", "bf16")):
        told = "fp16.enabled and bf16.enabled are both true: enable one of them"
        problems.append(Problem("bf16.enabled", told))
    deepcompile = document.get_value("compile.deepcompile")
    if deepcompile not in (None, False):
        told = (
            f"compile.deepcompile is {deepcompile!r}: its graphs write gradients where optimizer.step() does not look;"
            " leave it out, Accelerator(dynamo_backend='inductor') compiles too"
        )
        problems.append(Problem("compile.deepcompile", told))
    return problems


def inert_settings(document: HfDeepSpeedConfig) -> list[Problem]:
    """Settings that DeepSpeed accepts and does not follow at this stage."""
    stage = document.get_value("zero_optimization.stage", 0)
    if stage == "auto":
        return []
    found = []
    optimizer = document.get_value("zero_optimization.offload_optimizer.device", "none")
    parameters = document.get_value("zero_optimization.offload_param.device", "none")
    key = "zero_optimization.offload_optimizer.device"
    if parameters not in (None, "none") and stage != 3:
        told = f"offload_param ({parameters}) works at stage 3 only; at stage {stage} parameters stay where they are"
        found.append(Problem("zero_optimization.offload_param.device", told))
    if optimizer == "nvme" and stage in (1, 2):
        told = f"offload_optimizer to nvme works at stage 3 only; at stage {stage} DeepSpeed uses CPU memory instead"
        found.append(Problem(key, told))
    if document.is_true("msamp.enabled"):
        told = "msamp has no effect: MS-AMP would need its own deepspeed.initialize, which is not called here"
        found.append(Problem("msamp.enabled", told))
    if optimizer not in (None, "none") and stage == 0:
        told = "offload_optimizer needs stage 1 to 3; at stage 0 the optimizer stays on the device"
        found.append(Problem(key, told))
    return found
