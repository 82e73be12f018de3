"""A DeepSpeed config as a document: where it may come from, dotted access, lines."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroaccel.config.document import HfDeepSpeedConfig, assign, leaves
from zeroaccel.errors import ConfigError

KEY = st.text("abcdefgh_", min_size=1, max_size=4)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
CONFIG = st.dictionaries(
    KEY, st.recursive(SCALAR, lambda inner: st.dictionaries(KEY, inner, max_size=3), max_leaves=8), max_size=5
)
DOTTED = st.lists(KEY, min_size=1, max_size=4).map(".".join)

fast = settings(max_examples=60, deadline=None, derandomize=True)


@fast
@given(config=CONFIG)
def test_every_leaf_is_found_under_its_dotted_key(config: dict[str, Any]) -> None:
    document = HfDeepSpeedConfig(config)
    for key, value in leaves(config):
        assert document.get_value(key) == value


@fast
@given(config=CONFIG, key=DOTTED, value=SCALAR)
def test_an_assigned_key_is_read_back_and_leaves_the_others_alone(config: dict[str, Any], key: str, value: Any) -> None:
    before = dict(leaves(config))
    document = HfDeepSpeedConfig(config)
    assign(document.config, key, value)
    assert document.get_value(key) == value
    related = [k for k in before if k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.")]
    untouched = {k: v for k, v in before.items() if k not in related}
    after = dict(leaves(document.config))
    assert {k: after[k] for k in untouched} == untouched


@fast
@given(config=CONFIG, key=DOTTED)
def test_a_removed_key_is_gone_and_reading_never_fails(config: dict[str, Any], key: str) -> None:
    document = HfDeepSpeedConfig(config)
    document.del_config_sub_tree(key)
    assert document.get_value(key, "default") == "default"


@fast
@given(config=CONFIG)
def test_the_users_dictionary_is_not_touched(config: dict[str, Any]) -> None:
    original = copy.deepcopy(config)
    document = HfDeepSpeedConfig(config)
    assign(document.config, "zero_optimization.stage", 3)
    assert config == original


@fast
@given(config=CONFIG)
def test_json_text_and_base64_are_the_same_document(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    assert HfDeepSpeedConfig(text).config == config
    assert HfDeepSpeedConfig(base64.urlsafe_b64encode(text.encode()).decode()).config == config


@fast
@given(config=CONFIG)
def test_each_key_of_a_file_knows_its_line(config: dict[str, Any], tmp_path_factory: Any) -> None:
    path: Path = tmp_path_factory.mktemp("document") / "ds.json"
    path.write_text(json.dumps(config, indent=1))
    lines = path.read_text().splitlines()
    document = HfDeepSpeedConfig(str(path))
    for key, _ in leaves(config):
        origin, _, line = document.source_of(key).rpartition(":")
        assert origin == str(path)
        assert lines[int(line) - 1].strip().startswith(json.dumps(key.rpartition(".")[2]))


def test_keys_inside_lists_and_texts_with_brackets_do_not_disturb_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n "a": [{"b": 1}, [2]],\n "c": "} \\" { [",\n "d": {\n  "b": 2}\n}')
    document = HfDeepSpeedConfig(path)
    assert {key: document.source_of(key) for key in ("a", "c", "d.b", "b")} == {
        "a": f"{path}:2",
        "c": f"{path}:3",
        "d.b": f"{path}:5",
        "b": str(path),
    }


def test_a_key_of_a_file_knows_its_column_and_what_is_missing_the_place_of_its_section(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"a": 1,\n  "zero": {"stage": 2, "list": [{"x": 1}, 7, {"x": 2}]}}')
    document = HfDeepSpeedConfig(path)
    places = {key: tuple(document.place_of(key)) for key in ("a", "zero", "zero.stage", "zero.list.[1].x", "zero.no")}
    assert places == {"a": (1, 2), "zero": (2, 3), "zero.stage": (2, 12), "zero.list.[1].x": (2, 47), "zero.no": (2, 3)}
    assert document.place_of("no.such.key") == (1, 1)


def test_all_keys_that_are_there_twice_are_told_with_their_places() -> None:
    text = '{"a": 1, "b": {"c": 1,\n "c": 2}, "l": [{"d": 1}, {"d": 1, "d": 2}],\n"a": 3}'
    with pytest.raises(ConfigError) as caught:
        HfDeepSpeedConfig(text)
    assert str(caught.value).count("is there twice in one section, first in line 1: keep one of them") == 2
    for problem in ("JSON text:3:1: a is", "JSON text:2:2: b.c is", "JSON text:2:36: l.[1].d is"):
        assert problem in str(caught.value)


def test_stage_and_offload_are_read_again_on_request() -> None:
    document = HfDeepSpeedConfig({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert (document.is_zero3(), document.is_zero2(), document.is_offload()) == (True, False, True)
    document.config["zero_optimization"] = {"stage": 2}
    document.set_stage_and_offload()
    assert (document.is_zero3(), document.is_zero2(), document.is_offload()) == (False, True, False)


def test_what_is_not_set_is_neither_true_nor_false() -> None:
    document = HfDeepSpeedConfig({"a": {"yes": 1, "no": 0, "null": None}})
    assert [document.is_true(f"a.{key}") for key in ("yes", "no", "null", "missing")] == [True, False, False, False]
    assert [document.is_false(f"a.{key}") for key in ("yes", "no", "null", "missing")] == [False, True, False, False]
