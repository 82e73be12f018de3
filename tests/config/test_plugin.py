"""The plugin: who wins, where values come from, what survives a `prepare()`."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.config.facts import DUMMY, MODEL, REAL, facts, plugin
from zeroaccel.config.auto import resolve
from zeroaccel.config.facts import LoaderFact
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.precedence import (
    EXCEPTIONS,
    FIELD_KEYS,
    PRECEDENCE,
    WITHOUT_KEY,
    Level,
    Said,
    choose_mixed_precision,
    settle,
)

# --- precedence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient_clipping", *EXCEPTIONS])
def test_each_level_beats_all_below_it_and_names_what_it_beat(name: str) -> None:
    order = EXCEPTIONS.get(name, PRECEDENCE)
    said = [Said(number, level, level.name) for number, level in enumerate(order)]
    for first in range(len(order)):
        winner, losers = settle(name, reversed(said[first:]))
        assert winner.level is order[first]
        typed = [each for each in said[first + 1 :] if each.level is not Level.RULE]
        assert losers == [
            f"{name}: {first} ({order[first].name}) holds, not {each.value} ({each.source})" for each in typed
        ]


def test_the_tables_know_every_field_and_order_the_levels_completely() -> None:
    assert set(PRECEDENCE) == set(Level)
    assert set(EXCEPTIONS["mixed_precision"]) == set(Level) - {Level.PLUGIN}  # the plugin has no such field
    assert set(FIELD_KEYS.values()) == {*WITHOUT_KEY, "gradient_clipping"}


def test_what_a_missing_key_means_is_what_deepspeed_takes_it_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    offload: dict[str, Any] = {"offload_optimizer": {}, "offload_param": {}}
    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": offload})
    zero = config.zero_config
    assert config.gradient_clipping == 1.0, "uninvited, so we always write the number"
    assert config.gradient_accumulation_steps == WITHOUT_KEY["gradient_accumulation_steps"]
    assert zero.stage == WITHOUT_KEY["zero_optimization.stage"]
    key = "stage3_gather_16bit_weights_on_model_save"
    assert zero.gather_16bit_weights_on_model_save == WITHOUT_KEY[f"zero_optimization.{key}"]
    for name, section in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        assert section.device == WITHOUT_KEY[f"zero_optimization.{name}.device"]
        assert section.nvme_path is None


# field, number in the document, argument, launcher's text and its meaning
FIELDS = [
    ("gradient_accumulation_steps", 2, 3, "4", 4),
    ("gradient_clipping", 2.0, 3.0, "4.5", 4.5),
    ("zero_stage", 1, 2, "3", 3),
    ("offload_optimizer_device", "cpu", "nvme", "none", "none"),
    ("offload_param_device", "cpu", "nvme", "none", "none"),
    ("offload_optimizer_nvme_path", "/a", "/b", "/c", "/c"),
    ("offload_param_nvme_path", "/a", "/b", "/c", "/c"),
    ("zero3_save_16bit_model", True, False, "false", False),
]
VARIABLES = {
    "gradient_accumulation_steps": "ZEROACCEL_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ZEROACCEL_GRADIENT_CLIPPING",
}


def variable_of(field: str) -> str:
    return VARIABLES.get(field, f"ZEROACCEL_DEEPSPEED_{field.upper()}")


def document_with(field: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {}, "offload_param": {}}}
    node = config
    *sections, key = FIELD_KEYS[field].split(".")
    for section in sections:
        node = node[section]
    node[key] = value
    return config


@pytest.mark.parametrize(("field", "number", "argument", "text", "launched"), FIELDS, ids=[row[0] for row in FIELDS])
def test_document_beats_argument_beats_launcher_beats_default(
    field: str, number: Any, argument: Any, text: str, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = FIELD_KEYS[field]

    def held(value: Any, arguments: dict[str, Any]) -> tuple[Any, Any, str]:
        made = DeepSpeedPlugin(document_with(field, value), **arguments)
        return made.get_value(key), getattr(made, field), made.source_of(key)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held("auto", {field: argument}) == (argument, argument, f"DeepSpeedPlugin({field}=...)")
        default = held("auto", {})
        assert default[2] == "default"
        monkeypatch.setenv(variable_of(field), text)
        assert held("auto", {}) == (launched, launched, variable_of(field))
    if argument != launched:
        with pytest.warns(UserWarning, match=rf"holds, not .* \({variable_of(field)}\)"):
            assert held("auto", {field: argument})[0] == argument
    with pytest.warns(UserWarning, match="holds, not") as caught:
        assert held(number, {field: argument}) == (number, number, "dict argument")
    assert len(caught) == 1, "one warning for all losers"
    assert f"DeepSpeedPlugin({field}=...)" in str(caught[0].message)
    assert variable_of(field) in str(caught[0].message)


def test_equal_values_and_defaults_that_lose_are_not_worth_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROACCEL_DEEPSPEED_ZERO_STAGE", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = DeepSpeedPlugin({"zero_optimization": {"stage": 3}}, zero_stage=3, gradient_clipping="auto")
    assert made.zero_stage == 3


def test_accelerates_variable_is_shown_as_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    resolved = resolve(DeepSpeedPlugin(), facts())
    entries = {entry.key: entry for entry in resolved.entries}
    assert (entries["zero_optimization.stage"].value, entries["zero_optimization.stage"].source) == (
        3,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    )
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE" in resolved.table()


def test_a_key_that_the_document_lacks_means_deepspeeds_default_and_the_argument_is_named() -> None:
    with pytest.warns(UserWarning, match=r"zero_stage: 0 \(dict argument has none\) holds, not 3") as caught:
        made = DeepSpeedPlugin({"zero_optimization": {}}, zero_stage=3)
    assert made.zero_stage == 0
    assert 'write "auto" in the DeepSpeed config' in str(caught[0].message)


@pytest.mark.parametrize(
    ("document", "arguments", "policy", "clips"),
    [
        (None, {}, "fast", 0.0),
        (None, {}, "accelerate", 1.0),
        (None, {"gradient_clipping": 0}, "accelerate", 0),
        (None, {"gradient_clipping": 0.5}, "fast", 0.5),
        ({}, {}, "fast", 0.0),
        ({}, {}, "accelerate", 1.0),
        ({}, {"gradient_clipping": 0.5}, "fast", 0.5),
        ({"gradient_clipping": None}, {}, "fast", 0.0),
        ({"gradient_clipping": 0}, {}, "accelerate", 0),
    ],
)
def test_clipping_is_always_written_and_off_unless_somebody_asked(
    document: dict[str, Any] | None, arguments: dict[str, Any], policy: str, clips: float
) -> None:
    config = None if document is None else {"zero_optimization": {"stage": 2}, **document}
    made = DeepSpeedPlugin(config, auto_policy=policy, **arguments)
    assert prepare(made)["gradient_clipping"] == made.gradient_clipping == clips


def test_a_document_without_accumulation_means_one() -> None:
    with pytest.warns(UserWarning, match="gradient_accumulation_steps: 1 .*holds, not 4"):
        made = DeepSpeedPlugin({"zero_optimization": {"stage": 2}}, gradient_accumulation_steps=4)
    assert made.deepspeed_config["gradient_accumulation_steps"] == made.gradient_accumulation_steps == 1


def test_the_accelerators_accumulation_loses_to_a_number_and_is_named() -> None:
    made = plugin(gradient_accumulation_steps=2)
    resolved = resolve(made, facts(accumulation_steps=4, accumulation_typed=True))
    assert resolved.config["gradient_accumulation_steps"] == 2
    assert resolved.warnings == ("gradient_accumulation_steps: 2 (dict argument) holds, not 4 (Accelerator)",)
    assert resolve(made, facts(accumulation_steps=4)).warnings == (), "an untyped default is no loser"


def test_a_loader_that_contradicts_the_written_micro_batch_is_named() -> None:
    resolved = resolve(plugin(train_micro_batch_size_per_gpu=8), facts())
    assert resolved.warnings == (
        "train_micro_batch_size_per_gpu: 8 (dict argument) holds, not 4 (DataLoader, batch size 4)",
    )


# --- mixed precision --------------------------------------------------------------------------------------------


def test_the_accelerators_precision_beats_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mixed_precision(None) == Said("no", Level.RULE, "default")
    monkeypatch.setenv("ZEROACCEL_MIXED_PRECISION", "fp16")
    assert choose_mixed_precision(None) == Said("fp16", Level.LAUNCHER, "ZEROACCEL_MIXED_PRECISION")
    with pytest.warns(UserWarning, match=r"'bf16' \(Accelerator.*\) holds, not 'fp16' \(ZEROACCEL_MIXED_PRECISION\)"):
        assert choose_mixed_precision("BF16").value == "bf16"


# asked, the document's sections, what is enabled afterwards (fp16, bf16)
PRECISIONS: list[tuple[str, dict[str, Any], tuple[Any, Any]]] = [
    ("no", {}, (False, False)),
    ("fp16", {}, (True, False)),
    ("bf16", {}, (False, True)),
    ("fp8", {}, (False, True)),
    ("fp16", {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, (True, False)),
    ("no", {"bf16": {"enabled": True}}, (False, True)),
    ("bf16", {"bf16": {"enabled": False}}, (False, False)),
]


@pytest.mark.parametrize(("asked", "sections", "enabled"), PRECISIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_precision_fills_what_the_document_leaves_open(
    asked: str, sections: dict[str, Any], enabled: tuple[Any, Any]
) -> None:
    made = DeepSpeedPlugin({"zero_optimization": {"stage": 2}, **copy.deepcopy(sections)})
    made.set_mixed_precision(asked, "Accelerator(mixed_precision=...)")
    assert (made.get_value("fp16.enabled"), made.get_value("bf16.enabled")) == enabled
    added_by_us = "fp16" not in sections and asked == "fp16"
    assert made.get_value("fp16.auto_cast") == (True if added_by_us else None)
    for name in ("fp16", "bf16"):
        given = sections.get(name, {}).get("enabled", "auto") != "auto"
        source = "dict argument" if given else "Accelerator(mixed_precision=...)"
        assert made.source_of(f"{name}.enabled") == source


@pytest.mark.parametrize(
    ("asked", "sections", "words"),
    [
        ("no", {"bf16": {"enabled": True}}, "mixed_precision='no' (here) has no effect: the DeepSpeed config"),
        ("bf16", {"bf16": {"enabled": False}}, "mixed_precision='bf16' (here) has no effect: the DeepSpeed config"),
        ("fp8", {}, "mixed_precision='fp8' (here) trains in bf16"),
    ],
)
def test_a_precision_without_effect_is_told(asked: str, sections: dict[str, Any], words: str) -> None:
    made = DeepSpeedPlugin({"zero_optimization": {"stage": 2}, **sections})
    with pytest.warns(UserWarning, match=re.escape(words)):
        made.set_mixed_precision(asked, "here")


def test_a_precision_that_nobody_asked_for_gives_way_silently() -> None:
    made = DeepSpeedPlugin({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.set_mixed_precision("no")


# --- single fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "argument", "variable", "result", "warns"),
    [
        (3, None, None, True, False),
        (3, None, "false", False, False),
        (3, False, None, False, False),
        (2, None, None, False, False),
        (2, True, None, False, True),
        (2, None, "true", False, True),
    ],
)
def test_zero3_init_follows_the_stage_and_works_at_stage_3_only(
    stage: int,
    argument: bool | None,
    variable: str | None,
    result: bool,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("ZEROACCEL_DEEPSPEED_ZERO3_INIT", variable)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=argument)
    assert made.zero3_init_flag is made.is_zero3_init_enabled() is result
    assert ["stage 3 only" in str(warning.message) for warning in caught] == [True] * warns


def test_progress_lines_of_deepspeed_are_off_whatever_the_file_says() -> None:
    made = plugin(steps_per_print=10)
    assert made.deepspeed_config["steps_per_print"] == float("inf")
    assert made.source_of("steps_per_print").startswith("rule")


def test_moe_layers_come_from_argument_or_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROACCEL_DEEPSPEED_MOE_LAYER_CLS_NAMES", "A,B")
    assert DeepSpeedPlugin().transformer_moe_cls_names == "A,B"
    with pytest.warns(UserWarning, match="holds, not 'A,B'"):
        assert DeepSpeedPlugin(transformer_moe_cls_names="C").transformer_moe_cls_names == "C"


def test_msamp_gets_its_section_and_prepare_says_that_it_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROACCEL_FP8_BACKEND", "MSAMP")
    made = DeepSpeedPlugin(msamp_opt_level="O2")
    assert made.deepspeed_config["msamp"] == {"enabled": True, "opt_level": "O2"}
    assert any("msamp has no effect" in warning for warning in resolve(made, facts()).warnings)


def test_fields_equal_to_the_document_do_not_make_a_launch_config_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "zero_stage,mixed_precision,deepspeed_multinode_launcher")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = DeepSpeedPlugin({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
    assert made.zero_stage == 3


def test_a_plugin_is_selected_through_the_state_only() -> None:
    made = plugin()
    assert not made.selected
    made.select(_from_accelerator_state=True)
    assert made.selected
    made._unselect()
    assert not made.selected


# --- provenance -------------------------------------------------------------------------------------------------


def test_every_value_names_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    config = {
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "train_batch_size": "auto",
    }
    path.write_text(json.dumps(config, indent=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    made = DeepSpeedPlugin(str(path), auto_policy="accelerate")
    made.set_mixed_precision("bf16", "Accelerator(mixed_precision=...)")
    made.deepspeed_config["wall_clock_breakdown"] = True
    sources = {entry.key: entry.source for entry in resolve(made, facts()).entries}
    assert sources == {
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
        "zero_optimization.stage": f"{path}:4",
        "zero_optimization.reduce_bucket_size": "rule",
        "train_batch_size": "rule",
        "gradient_accumulation_steps": f"{path} has none",
        "steps_per_print": "rule",
        "bf16.enabled": "Accelerator(mixed_precision=...)",
        "fp16.enabled": "Accelerator(mixed_precision=...)",
        "train_micro_batch_size_per_gpu": "DataLoader",
        "wall_clock_breakdown": "deepspeed_config[...] of the script",
        "zero_allow_untested_optimizer": "rule",
    }


def test_the_table_has_one_aligned_line_a_value() -> None:
    resolved = resolve(plugin(), facts())
    head, *lines = resolved.table().splitlines()
    assert head.split() == ["key", "value", "source", "reason"]
    assert [line.split()[0] for line in lines] == [entry.key for entry in resolved.entries]
    column = head.index("source")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


# --- several prepares -------------------------------------------------------------------------------------------


def prepare(made: DeepSpeedPlugin, **known: Any) -> dict[str, Any]:
    resolved = resolve(made, facts(**known))
    made.adopt(resolved)
    return resolved.config


def test_resolving_leaves_the_plugin_as_it_is() -> None:
    made = plugin({"reduce_bucket_size": "auto"}, optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    before = (copy.deepcopy(made.deepspeed_config), {name: getattr(made, name) for name in FIELD_KEYS})
    resolved = resolve(made, facts(optimizer=DUMMY))
    resolved.config["zero_optimization"]["stage"] = 99
    assert (made.deepspeed_config, {name: getattr(made, name) for name in FIELD_KEYS}) == before


def test_a_second_prepare_sees_auto_again() -> None:
    made = plugin(train_micro_batch_size_per_gpu="auto", train_batch_size="auto")
    assert prepare(made)["train_batch_size"] == 4
    assert made.deepspeed_config["train_batch_size"] == 4, "shows the newest result"
    assert prepare(made, loaders=(LoaderFact(16, True),))["train_batch_size"] == 16


def test_a_second_prepare_keeps_what_the_user_assigned_between() -> None:
    made = plugin(train_micro_batch_size_per_gpu="auto", train_batch_size="auto")
    prepare(made)
    made.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    made.deepspeed_config["zero_optimization"]["overlap_comm"] = False
    second = prepare(made, loaders=(LoaderFact(16, True),))
    assert (second["train_micro_batch_size_per_gpu"], second["train_batch_size"]) == (2, 2)
    assert second["zero_optimization"]["overlap_comm"] is False
    third = prepare(made, loaders=(LoaderFact(8, True),))
    assert third["train_micro_batch_size_per_gpu"] == 2, "assigned once, it stays"
    assert made.source_of("train_micro_batch_size_per_gpu") == "deepspeed_config[...] of the script"


def test_a_second_prepare_does_without_what_the_user_deleted_between() -> None:
    made = plugin(gradient_clipping=0.5)
    prepare(made)
    del made.deepspeed_config["gradient_clipping"]
    assert prepare(made)["gradient_clipping"] == 0.0, "as if nobody had asked"


def test_what_the_library_writes_between_two_prepares_is_asked_for_as_well() -> None:
    made = plugin(fp16={"enabled": "auto"}, bf16={"enabled": "auto"})
    prepare(made)
    made.deepspeed_config["bf16"]["enabled"] = "auto"
    made.set_mixed_precision("bf16", "Accelerator(mixed_precision=...)")
    assert prepare(made)["bf16"] == {"enabled": True}


def test_sections_that_one_prepare_had_no_use_for_serve_the_next() -> None:
    made = plugin({"stage": 3}, optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    assert "optimizer" not in prepare(made, optimizer=None)
    assert prepare(made, optimizer=DUMMY)["optimizer"]["params"]["lr"] == 0.01


def test_a_second_prepare_without_a_loader_knows_the_batch_size() -> None:
    made = plugin(train_micro_batch_size_per_gpu="auto", train_batch_size="auto")
    prepare(made)
    second = prepare(made, loaders=(), known_micro_batch_size=4)
    assert (second["train_micro_batch_size_per_gpu"], second["train_batch_size"]) == (4, 4)


def test_fields_show_what_runs_before_and_after_prepare() -> None:
    made = DeepSpeedPlugin(zero_stage=1)
    assert made.gradient_accumulation_steps == "auto"
    prepare(made, accumulation_steps=3, accumulation_typed=True, model=MODEL, optimizer=REAL)
    assert (made.gradient_accumulation_steps, made.gradient_clipping, made.zero_stage) == (3, 0.0, 1)
