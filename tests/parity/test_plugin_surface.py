"""What the generated cases do not reach: the plugin's surface, and single deliberate differences."""

from __future__ import annotations

import base64
import copy
import dataclasses
import inspect
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DeepSpeedPlugin as TheirPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig as TheirDocument
from transformers.integrations.deepspeed import HfDeepSpeedConfig as TransformersDocument

from tests.parity.plugin_cases import (
    REFUSED,
    Case,
    Outcome,
    generated_document,
    our_plugin,
    our_prepare,
    outcome,
    some_of,
    their_plugin,
    their_prepare,
)
from zeroaccel.config import environment
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.errors import ConfigError

DOCUMENT = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    "bf16": {"enabled": "auto"},
}


def test_fields_have_accelerates_names_order_and_defaults() -> None:
    theirs = [(f.name, f.default) for f in dataclasses.fields(TheirPlugin)]
    ours = [(f.name, f.default) for f in dataclasses.fields(DeepSpeedPlugin)]
    assert ours[: len(theirs)] == theirs
    assert [name for name, _ in ours[len(theirs) :]] == ["auto_policy", "cast_inputs"]


def test_environment_table_has_every_variable_that_accelerates_plugin_reads() -> None:
    text = Path(inspect.getfile(TheirPlugin)).read_text(encoding="utf-8")
    body = text[text.index("class DeepSpeedPlugin") :]
    read = set(re.findall(r'environ\.get\(\s*"ACCELERATE_(\w+)"', body[: body.index("\nclass ", 1)]))
    assert len(read) > 10
    assert read <= set(environment.FIELDS.values()) | {"FP8_BACKEND", "FP8_OPT_LEVEL"}


@pytest.mark.parametrize("form", ["dict", "path", "json", "base64", "accelerate", "transformers"])
def test_document_may_come_in_any_form_that_accelerate_takes(form: str, tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT)
    (tmp_path / "ds.json").write_text(text)
    made: dict[str, Callable[[], Any]] = {
        "dict": lambda: copy.deepcopy(DOCUMENT),
        "path": lambda: str(tmp_path / "ds.json"),
        "json": lambda: text,
        "base64": lambda: base64.urlsafe_b64encode(text.encode()).decode(),
        "accelerate": lambda: TheirDocument(DOCUMENT),
        "transformers": lambda: TransformersDocument(DOCUMENT),
    }
    ours, theirs = DeepSpeedPlugin(made[form]()), TheirPlugin(made[form]())
    for plugin in (ours, theirs):
        plugin.set_mixed_precision("bf16")
    assert ours.deepspeed_config == theirs.deepspeed_config
    assert ours.zero3_init_flag == theirs.zero3_init_flag


KEYS = (
    "zero_optimization.stage",
    "zero_optimization.offload_param",
    "bf16.enabled",
    "gradient_clipping",
    "a.b",
    "fp16",
)


def removed(document: Any, key: str) -> Outcome:
    def compute() -> dict[str, Any]:
        document.del_config_sub_tree(key, must_exist=True)
        return dict(document.config)

    return outcome(compute)


@pytest.mark.parametrize("seed", range(40))
def test_documents_answer_alike(seed: int) -> None:
    document = generated_document(random.Random(seed), 0.5)
    ours, theirs = HfDeepSpeedConfig(document), TheirDocument(document)
    for key in KEYS:
        for question in ("get_value", "is_true", "is_false"):
            assert getattr(ours, question)(key) == getattr(theirs, question)(key), (question, key)
    for question in ("is_zero2", "is_zero3", "is_offload"):
        assert getattr(ours, question)() == getattr(theirs, question)(), question
    for key in KEYS:
        assert removed(ours, key) == removed(theirs, key)


VALUES = {"gradient_clipping": (0.5, 1.0), "zero_optimization.stage": (2, 3), "train_batch_size": (8,)}


@pytest.mark.parametrize("seed", range(60))
def test_fill_match_and_config_process_do_and_refuse_alike(seed: int) -> None:
    draw = random.Random(seed)
    document = some_of(draw, {"gradient_clipping": ("auto", 0.5), "train_batch_size": ("auto", 8)}, 0.7)
    document["zero_optimization"] = {"stage": draw.choice(("auto", 3))}
    given, must_match = some_of(draw, VALUES, 0.7), draw.random() < 0.7

    def run(plugin_class: type) -> Outcome:
        def compute() -> dict[str, Any]:
            plugin, mismatches = plugin_class(copy.deepcopy(document)), []  # type: ignore[var-annotated]
            plugin.deepspeed_config.setdefault("gradient_clipping", "auto")  # differs on purpose: missing-clipping
            plugin.fill_match("gradient_clipping", mismatches, must_match, **{"gradient_clipping": 1.0, **given})
            automatic = {key: plugin.is_auto(key) for key in VALUES}
            plugin.deepspeed_config_process(must_match=must_match, **given)
            return {"config": plugin.deepspeed_config, "auto": automatic, "mismatches": len(mismatches)}

        return outcome(compute)

    assert run(DeepSpeedPlugin) == run(TheirPlugin)


# --- deliberate differences that need no generated case ---------------------------------------------------------


def test_a_path_object_is_read_where_accelerate_ignores_it(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert TheirPlugin(path).zero_stage == 2
    assert DeepSpeedPlugin(path).zero_stage == 1


def test_a_key_twice_in_the_json_is_refused(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 1, "stage": 3}}'
    assert TheirPlugin(text).zero_stage == 3
    with pytest.raises(ConfigError, match="stage is there twice"):
        DeepSpeedPlugin(text)


def test_fields_show_what_deepspeed_runs_with_where_the_document_lacks_the_key() -> None:
    arguments: dict[str, Any] = {"zero_stage": 3, "offload_param_device": "cpu"}
    document: dict[str, Any] = {"zero_optimization": {}, "gradient_clipping": 1.0}
    theirs = TheirPlugin(document, **arguments)
    with pytest.warns(UserWarning, match=r"zero_stage: 0 .* holds, not 3"):
        ours = DeepSpeedPlugin(document, **arguments)
    assert ours.deepspeed_config == theirs.deepspeed_config
    assert (theirs.zero_stage, theirs.offload_param_device) == (3, "cpu")
    assert (ours.zero_stage, ours.offload_param_device) == (0, "none")


def test_an_auto_that_deepspeed_itself_understands_is_left_to_it() -> None:
    zenflow = {"topk_ratio": 0.1, "select_strategy": "auto"}
    case = Case(document={"zero_optimization": {"stage": 2, "zenflow": zenflow}})
    assert their_prepare(case) == REFUSED
    ours = our_prepare(case)
    assert isinstance(ours, dict)
    assert ours["zero_optimization"]["zenflow"] == zenflow


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_rocm_gets_no_communication_type_of_its_own(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.dataclasses.is_rocm_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.dataclasses.logger", logging.getLogger("accelerate"))
    theirs, ours = their_plugin(Case(precision=precision)), our_plugin(Case(precision=precision))
    assert isinstance(theirs, dict)
    assert theirs.pop("communication_data_type") == "fp32"
    assert ours == theirs
