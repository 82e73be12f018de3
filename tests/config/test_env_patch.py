"""Reading and changing environment variables; Accelerate's functions are the reference where a case is shared."""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable
from typing import Any

import accelerate.utils.environment as theirs
import pytest

from zeroaccel.config import env_patch as ours
from zeroaccel.errors import ConfigError

WORDS = ["y", "YES", "t", "True", "on", "1", "n", "No", "f", "false", "OFF", "0", "", "2", "maybe", "-1", "none"]


@pytest.fixture(autouse=True)
def _environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZA_FIRST", "ZA_SECOND", "ZEROACCEL_MARK", "ACCELERATE_MARK"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ValueError:
        return ValueError


@pytest.mark.parametrize("word", WORDS)
def test_str_to_bool_means_what_accelerates_does(word: str) -> None:
    for to_bool in (False, True):
        expected, actual = (_outcome(module.str_to_bool, word, to_bool=to_bool) for module in (theirs, ours))
        assert (type(actual), actual) == (type(expected), expected)


@pytest.mark.parametrize("word", [*WORDS, None])
def test_flags_choices_and_numbers_are_read_as_accelerate_reads_them(
    word: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word is not None:
        monkeypatch.setenv("ZA_FIRST", word)
    monkeypatch.setenv("ZA_SECOND", "7")
    for default in (True, False):
        expected, actual = (_outcome(module.parse_flag_from_env, "ZA_FIRST", default) for module in (theirs, ours))
        assert (type(actual), actual) == (type(expected), expected)
    expected, actual = (module.parse_choice_from_env("ZA_FIRST", "no") for module in (theirs, ours))
    assert actual == expected
    expected, actual = (_outcome(module.get_int_from_env, ["ZA_FIRST", "ZA_SECOND"], 3) for module in (theirs, ours))
    assert actual == expected
    assert ours.get_int_from_env(["ZA_NONE"], 3) == 3


def test_a_flag_that_is_neither_true_nor_false_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZA_FIRST", "maybe")
    with pytest.raises(ConfigError, match=r"ZA_FIRST is 'maybe'.*write true or false"):
        ours.parse_flag_from_env("ZA_FIRST")


def test_patch_environment_sets_upper_case_texts_and_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZA_FIRST", "before")
    untouched = dict(os.environ)

    def fail_inside() -> None:
        with ours.patch_environment(za_first=1, za_second=None):
            assert (os.environ["ZA_FIRST"], os.environ["ZA_SECOND"]) == ("1", "None")
            del os.environ["ZA_FIRST"]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert dict(os.environ) == untouched


def test_clear_environment_empties_and_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZA_FIRST", "before")
    untouched = dict(os.environ)
    with ours.clear_environment():
        assert dict(os.environ) == {}
        os.environ["ZA_SECOND"] = "new"
    assert dict(os.environ) == untouched


def test_a_purged_function_leaves_no_variable_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MARK", "before")

    @ours.purge_accelerate_environment
    def change(value: str) -> str:
        """Changes."""
        os.environ.update(ZEROACCEL_MARK=value, ACCELERATE_MARK=value, ZA_FIRST=value)
        return value

    assert (change("new"), change.__doc__) == ("new", "Changes.")
    assert os.environ.get("ZEROACCEL_MARK") is None
    assert (os.environ["ACCELERATE_MARK"], os.environ["ZA_FIRST"]) == ("before", "new")


@pytest.mark.parametrize("base", [object, unittest.TestCase])
def test_a_purged_class_cleans_up_after_its_tests_and_those_of_subclasses(base: type) -> None:
    seen = []

    @ours.purge_zeroaccel_environment
    class Tests(base):  # type: ignore[misc]
        def test_one(self) -> None:
            os.environ["ZEROACCEL_MARK"] = "one"

        def helper(self) -> None:
            os.environ["ZEROACCEL_MARK"] = "helper"

    class More(Tests):
        def test_two(self) -> None:
            seen.append(os.environ.get("ZEROACCEL_MARK"))
            os.environ["ACCELERATE_MARK"] = "two"

    for tests in (Tests(), More()):
        tests.test_one()
        assert "ZEROACCEL_MARK" not in os.environ
    More().test_two()
    assert seen == [None]
    assert "ACCELERATE_MARK" not in os.environ
    Tests().helper()
    assert os.environ["ZEROACCEL_MARK"] == "helper"


def test_an_environment_file_gets_the_lines_that_accelerate_gives_it(caplog: pytest.LogCaptureFixture) -> None:
    variables = {"A": "1", "B": "a b", "C": "", "": "x", "D;": "1", "E": "<1", "F": "x>", "G": "a\nb", "H": "/a:b=c,d"}
    assert ours.convert_dict_to_env_variables(variables) == theirs.convert_dict_to_env_variables(variables)
    told = [record for record in caplog.records if record.name == "zeroaccel.utils.environment"]
    assert len(told) == 7
    assert "B='a b'" in caplog.text
