"""Accelerate's plugin and ours on the same generated cases: the same dictionary, or both refuse.

Where we differ on purpose, a `Difference` says how: our outcome is the one that Accelerate has for an altered case, or
a refusal. Every difference is explained in docs/differences.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.parity.plugin_cases import (
    FEATURES,
    REFUSED,
    Case,
    Outcome,
    our_plugin,
    our_prepare,
    plugin_case,
    prepare_case,
    their_plugin,
    their_prepare,
)
from zeroaccel.config.document import HfDeepSpeedConfig


@dataclass(frozen=True)
class Difference:
    """A deliberate difference.

    Attributes:
        anchor: of its entry in docs/differences.md.
        reason: in one line.
        applies: whether it concerns a case.
        altered: the case that Accelerate must be given to end where we do; None: we refuse.
    """

    anchor: str
    reason: str
    applies: Callable[[Case], bool]
    altered: Callable[[Case], Case | None]


def _yaml_fields_agree(case: Case) -> bool:
    """`zero_stage` is the only field that the generator names in the launch config file."""
    asked = case.arguments.get("zero_stage", int(case.environment.get("DEEPSPEED_ZERO_STAGE", 2)))
    return bool((case.value("zero_optimization.stage") or 0) == asked)


def _their_values(case: Case, *keys: str) -> list[Any]:
    """What Accelerate would hand to DeepSpeed; None for what it does not, or where it refuses."""
    theirs = their_prepare(case)
    document = HfDeepSpeedConfig(theirs if isinstance(theirs, dict) else {})
    return [document.get_value(key) for key in keys]


def _contradicting_batch_sizes(case: Case) -> bool:
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, steps, total = _their_values(case, *keys)
    return None not in (micro, steps, total) and micro * steps * case.world_size != total


def _empty_share(case: Case) -> bool:
    return _their_values(case, "train_micro_batch_size_per_gpu") == [0]


def _derived_micro_batch(case: Case) -> int:
    """From the total; 0 where it does not come out even."""
    steps = case.value("gradient_accumulation_steps") or 1
    for asked in (case.arguments.get("gradient_accumulation_steps", "auto"), case.accumulation):
        steps = asked if steps == "auto" else steps
    size, rest = divmod(case.value("train_batch_size"), steps * case.world_size)
    return 0 if rest else size


def _impossible_value(case: Case) -> bool:
    for part in ("offload_optimizer", "offload_param"):
        device, path = _their_values(case, *(f"zero_optimization.{part}.{key}" for key in ("device", "nvme_path")))
        if device == "nvme" and path in (None, "none"):
            return True
    return _their_values(case, "fp16.enabled", "bf16.enabled") == [True, True]


def _asked_for_no_clipping(case: Case) -> bool:
    asked = case.arguments.get("gradient_clipping", case.environment.get("GRADIENT_CLIPPING"))
    return case.document is None and asked in (0, "0")


def _written_out(case: Case) -> Case:
    """The plugin's fields as a document."""
    theirs = their_plugin(case)
    if case.document is not None or not isinstance(theirs, dict):
        return case
    kept = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization")
    document = {key: theirs[key] for key in (*kept, "gradient_clipping") if key in theirs}
    return dataclasses.replace(case, document=document).without_variable("CONFIG_DS_FIELDS")


def _with(case: Case, values: dict[str, Any]) -> Case:
    written = _written_out(case)
    return case if written.document is None else written.written(values)


def _without(case: Case, key: str) -> Case:
    written = _written_out(case)
    document = HfDeepSpeedConfig(written.document or {})
    document.del_config_sub_tree(key)
    return case if written.document is None else dataclasses.replace(written, document=document.config)


def _offloads(case: Case, *stages: int | None) -> bool:
    stage, device = _their_values(case, "zero_optimization.stage", "zero_optimization.offload_optimizer.device")
    return stage in stages and device not in (None, "none")


CLIPPING_DIFFERENCES = (
    Difference(
        "clipping-zero",
        "gradient_clipping=0 is off, not left to DeepSpeed, which clips at 1.0",
        _asked_for_no_clipping,
        lambda case: _with(case, {"gradient_clipping": 0}),
    ),
    Difference(
        "missing-clipping",
        "a config without gradient_clipping leaves it open",
        lambda case: case.document is not None and "gradient_clipping" not in case.document,
        lambda case: case.written({"gradient_clipping": "auto"}),
    ),
)

PLUGIN_DIFFERENCES = (
    *CLIPPING_DIFFERENCES,
    Difference(
        "untyped-launcher-defaults",
        "accelerate launch exports accumulation 1 though nobody typed it",
        lambda case: case.prefix == "ACCELERATE_" and case.environment.get("GRADIENT_ACCUMULATION_STEPS") == "1",
        lambda case: case.without_variable("GRADIENT_ACCUMULATION_STEPS"),
    ),
    Difference(
        "unreadable-variables",
        "a variable that cannot be read is an error, also where an argument beats it",
        lambda case: case.environment.get("DEEPSPEED_ZERO3_INIT") == "maybe",
        lambda case: None,
    ),
    Difference(
        "equal-yaml-fields",
        "a launch config field beside a DeepSpeed config is ambiguous only where both differ",
        lambda case: case.document is not None and "CONFIG_DS_FIELDS" in case.environment and _yaml_fields_agree(case),
        lambda case: case.without_variable("CONFIG_DS_FIELDS"),
    ),
    Difference(
        "fields-follow-the-document",
        "zero_stage is 0 where the document has no stage, so MS-AMP does not trip over an asked 3",
        lambda case: case.document is not None and case.value("zero_optimization.stage") is None,
        lambda case: case.without_argument("zero_stage").without_variable("DEEPSPEED_ZERO_STAGE"),
    ),
)

PREPARE_DIFFERENCES = (
    *CLIPPING_DIFFERENCES,
    Difference(
        "unused-sections",
        "a model prepared without an optimizer has no use for the config's optimizer and scheduler",
        lambda case: case.optimizer == "none" and case.document is not None,
        lambda case: dataclasses.replace(
            case,
            document={
                key: value
                for key, value in (case.document or {}).items()
                if not (key == "optimizer" or (key == "scheduler" and case.scheduler == "none"))
            },
        ),
    ),
    Difference(
        "scheduler-twice",
        "a scheduler section beside lr_scheduler_callable: one of them would be ignored",
        lambda case: case.scheduler == "callable" and case.value("scheduler") is not None,
        lambda case: None,
    ),
    Difference(
        "evaluation-loaders",
        "an evaluation loader does not decide the training batch size unless is_train_batch_min=False",
        lambda case: case.arguments.get("is_train_batch_min", True) and any(shuffled for _, shuffled in case.loaders),
        lambda case: dataclasses.replace(case, loaders=tuple(loader for loader in case.loaders if loader[1])),
    ),
    Difference(
        "missing-micro-batch",
        "a config without the micro-batch size means 'auto'",
        lambda case: case.document is not None and "train_micro_batch_size_per_gpu" not in case.document,
        lambda case: case.written({"train_micro_batch_size_per_gpu": "auto"}),
    ),
    Difference(
        "micro-batch-from-total",
        "without a loader the micro-batch size follows from train_batch_size",
        lambda case: (
            not case.loaders
            and case.value("train_micro_batch_size_per_gpu") == "auto"
            and isinstance(case.value("train_batch_size"), int)
        ),
        lambda case: (
            case.written({"train_micro_batch_size_per_gpu": size}) if (size := _derived_micro_batch(case)) else None
        ),
    ),
    Difference(
        "inference-alone",
        "a model without an optimizer and a loader fits any batch size",
        lambda case: (
            case.optimizer == "none"
            and not case.loaders
            and case.value("train_micro_batch_size_per_gpu") in (None, "auto")
            and not isinstance(case.value("train_batch_size"), int)
        ),
        lambda case: dataclasses.replace(case, loaders=((case.world_size if case.split_batches else 1, True),)),
    ),
    Difference(
        "hidden-size",
        "a model that tells no hidden size gets it from its largest parameter",
        lambda case: case.hidden_size is None,
        lambda case: dataclasses.replace(case, hidden_size=math.isqrt(FEATURES**2)),
    ),
    Difference(
        "impossible-values",
        "values that cannot be are refused before DeepSpeed sees them",
        _impossible_value,
        lambda case: None,
    ),
    Difference(
        "batch-arithmetic",
        "batch sizes that contradict each other are refused with the arithmetic",
        _contradicting_batch_sizes,
        lambda case: None,
    ),
    Difference("batch-arithmetic", "split_batches with less than one sample a rank", _empty_share, lambda case: None),
    Difference(
        "kept-from-deepspeed",
        "stage 0 offloads nothing, so DeepSpeed does not hear of it",
        lambda case: _their_values(case, "zero_optimization.stage")[0] in (0, None),
        lambda case: _without(case, "zero_optimization.offload_optimizer"),
    ),
    Difference(
        "kept-from-deepspeed",
        "auto_cast without fp16 would cast the inputs of fp32 and bf16 models",
        lambda case: case.value("fp16.auto_cast") is not None and not _their_values(case, "fp16.enabled")[0],
        lambda case: _without(case, "fp16.auto_cast"),
    ),
    Difference(
        "kept-from-deepspeed",
        "the right CPU optimizer is chosen here, and DeepSpeed's check refuses its own CPU Adagrad",
        lambda case: case.optimizer == "real" and _offloads(case, 1, 2, 3),
        lambda case: _with(case, {"zero_force_ds_cpu_optimizer": False}),
    ),
)


def expected(case: Case, theirs: Callable[[Case], Outcome], differences: Iterable[Difference]) -> Outcome:
    """Accelerate's outcome for the case, with our deliberate differences."""
    altered: Case | None = case
    for difference in differences:
        if altered is not None and difference.applies(altered):
            altered = difference.altered(altered)
    return REFUSED if altered is None else theirs(altered)


# --- the comparison ---------------------------------------------------------------------------------------------

PLUGIN_CASES = 300
PREPARE_CASES = 300


@pytest.mark.parametrize("seed", range(PLUGIN_CASES))
def test_plugins_hold_the_same_config_or_both_refuse(seed: int) -> None:
    case = plugin_case(seed)
    assert our_plugin(case) == expected(case, their_plugin, PLUGIN_DIFFERENCES), case


@pytest.mark.parametrize("seed", range(PREPARE_CASES))
def test_prepare_hands_deepspeed_the_same_config_or_both_refuse(seed: int) -> None:
    case = prepare_case(seed)
    assert our_prepare(case) == expected(case, their_prepare, PREPARE_DIFFERENCES), case


@pytest.mark.parametrize(
    ("generate", "ours", "theirs", "count", "differences"),
    [
        (plugin_case, our_plugin, their_plugin, PLUGIN_CASES, PLUGIN_DIFFERENCES),
        (prepare_case, our_prepare, their_prepare, PREPARE_CASES, PREPARE_DIFFERENCES),
    ],
    ids=["plugin", "prepare"],
)
def test_generated_cases_are_not_mostly_refusals_and_meet_every_difference(
    generate: Callable[[int], Case],
    ours: Callable[[Case], Outcome],
    theirs: Callable[[Case], Outcome],
    count: int,
    differences: tuple[Difference, ...],
) -> None:
    cases = [generate(seed) for seed in range(count)]
    outcomes = [ours(case) for case in cases]
    assert outcomes.count(REFUSED) < 0.6 * count
    for dropped in differences:
        others = [difference for difference in differences if difference is not dropped]
        concerned = [(case, result) for case, result in zip(cases, outcomes, strict=True) if dropped.applies(case)]
        assert any(expected(case, theirs, others) != result for case, result in concerned), dropped.anchor


# --- the document that explains them ----------------------------------------------------------------------------

ENTRIES = Path(__file__).parents[2] / "docs" / "differences.md"


@pytest.mark.parametrize("difference", PLUGIN_DIFFERENCES + PREPARE_DIFFERENCES, ids=lambda each: each.anchor)
def test_each_difference_has_its_entry(difference: Difference) -> None:
    assert ENTRIES.read_text(encoding="utf-8").count(f'<a id="{difference.anchor}"></a>') == 1


def test_entries_have_one_anchor_each_and_name_tests_that_exist() -> None:
    rows = [line for line in ENTRIES.read_text(encoding="utf-8").splitlines() if line.startswith("| <a id=")]
    anchors = [re.findall(r'<a id="([a-z0-9-]+)"></a>', row) for row in rows]
    assert len({tuple(found) for found in anchors}) == len(rows)
    named = [match for row in rows for match in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)]
    assert len(named) >= len(PLUGIN_DIFFERENCES)
    for path, test in named:
        assert f"def {test}(" in (ENTRIES.parents[1] / path).read_text(encoding="utf-8"), (path, test)
