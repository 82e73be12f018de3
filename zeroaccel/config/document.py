"""A DeepSpeed JSON config: from a path, a dictionary, JSON text or base64, with dotted access."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from zeroaccel.errors import ConfigError, ConfigTypeError


class Place(NamedTuple):
    """Where something stands in a text, both counted from 1."""

    line: int
    column: int


class Problem(str):
    """What is wrong, in words, and the dotted key that it is about ("" for the whole)."""

    key: str

    def __new__(cls, key: str, text: str) -> Problem:
        """A text that knows its key."""
        problem = super().__new__(cls, text)
        problem.key = key
        return problem


class HfDeepSpeedConfig:
    """A DeepSpeed config and questions about it.

    Args:
        config_file_or_dict: path of a JSON file, a dictionary (which is copied), JSON text, or its url-safe base64.

    Attributes:
        config: the dictionary; changing it changes what is trained.
        origin: where it came from, in words.

    Raises:
        ConfigError: no such file, no JSON object in it, or a key twice.
        ConfigTypeError: an argument of another type.
    """

    def __init__(self, config_file_or_dict: dict[str, Any] | str | os.PathLike[str]) -> None:
        self.config, self.origin, self._places = _read(config_file_or_dict)
        self.set_stage_and_offload()

    def source_of(self, ds_key_long: str) -> str:
        """Where a dotted key was written: the origin, of a file with the line."""
        place = self._places.get(ds_key_long)
        return self.origin if place is None else f"{self.origin}:{place.line}"

    def place_of(self, ds_key_long: str) -> Place:
        """Where a dotted key, or the section that it would belong to, stands in the file."""
        while ds_key_long and ds_key_long not in self._places:
            ds_key_long = ds_key_long.rpartition(".")[0]
        return self._places.get(ds_key_long, Place(1, 1))

    def set_stage_and_offload(self) -> None:
        """Reads stage and offload again, after `config` was changed."""
        self._stage = self.get_value("zero_optimization.stage", -1)
        devices = [
            self.get_value(f"zero_optimization.{part}.device") for part in ("offload_optimizer", "offload_param")
        ]
        self._offload = self._stage in (2, 3) and any(device in ("cpu", "nvme") for device in devices)

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """The section that holds a dotted key, or None without it, and the key's last part."""
        *sections, key = ds_key_long.split(".")
        node: Any = self.config
        for section in sections:
            node = node.get(section)
            if not isinstance(node, dict):
                return None, key
        return node, key

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Value of a dotted key, `default` where it is not set."""
        node, key = self.find_config_node(ds_key_long)
        return default if node is None else node.get(key, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Removes a dotted key with all below it.

        Raises:
            ConfigError: it is not there, with `must_exist`.
        """
        node, key = self.find_config_node(ds_key_long)
        if node is not None and key in node:
            del node[key]
        elif must_exist:
            raise ConfigError(f"{ds_key_long} is not in the DeepSpeed config ({self.origin}), so it cannot be removed")

    def is_true(self, ds_key_long: str) -> bool:
        """Whether the key is set, and to something true."""
        value = self.get_value(ds_key_long)
        return value is not None and bool(value)

    def is_false(self, ds_key_long: str) -> bool:
        """Whether the key is set, and to something false."""
        value = self.get_value(ds_key_long)
        return value is not None and not bool(value)

    def is_zero2(self) -> bool:
        """Whether this is stage 2."""
        return bool(self._stage == 2)

    def is_zero3(self) -> bool:
        """Whether this is stage 3."""
        return bool(self._stage == 3)

    def is_offload(self) -> bool:
        """Whether stage 2 or 3 offloads optimizer or parameters."""
        return bool(self._offload)


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested config; an empty section is a value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def assign(config: dict[str, Any], ds_key_long: str, value: Any) -> None:
    """Sets a dotted key, and makes the sections that it lacks."""
    *sections, key = ds_key_long.split(".")
    for section in sections:
        if not isinstance(config.get(section), dict):
            config[section] = {}
        config = config[section]
    config[key] = value


# --- reading ----------------------------------------------------------------------------------------------------


def _read(source: object) -> tuple[dict[str, Any], str, dict[str, Place]]:
    """The config, where it came from, and the places of its keys where it is a file."""
    if isinstance(source, dict):
        return copy.deepcopy(source), "dict argument", {}
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigTypeError(
            f"hf_ds_config is a {type(source).__name__}: pass the path of a DeepSpeed config, a dictionary, JSON text"
            " or its base64"
        )
    text = str(source)
    if os.path.isfile(text):
        content = _content(text)
        return parse_json(content, text), text, {key: places[0] for key, places in _key_places(content).items()}
    if text.lstrip().startswith("{"):
        return parse_json(text, "JSON text"), "JSON text", {}
    if (decoded := _decoded(text)) is None:
        raise ConfigError(
            f"there is no DeepSpeed config {text!r}, and it is no JSON either: pass the path of a config, a dictionary,"
            " JSON text or its base64"
        )
    return parse_json(decoded, "base64 text"), "base64 text", {}


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"the DeepSpeed config {path} cannot be read: {reason}") from None


def _decoded(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
        json.loads(decoded)
    except (binascii.Error, UnicodeError, ValueError):
        return None
    return decoded


def parse_json(text: str, origin: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: no JSON, no object, or keys that are there twice; with line and column.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{origin}: a DeepSpeed config is a JSON object, this is a {type(config).__name__}")
    twice = [
        f"{origin}:{places[1].line}:{places[1].column}: {key} is there twice in one section, first in line"
        f" {places[0].line}: keep one of them"
        for key, places in _key_places(text).items()
        if len(places) > 1
    ]
    if twice:
        raise ConfigError.join(twice)
    return config


_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]')


def _key_places(text: str) -> dict[str, list[Place]]:
    """Places of every dotted key of valid JSON text; sections inside a list are called [0], [1] ..."""
    found: dict[str, list[Place]] = defaultdict(list)
    path: list[str] = []  # of the open section
    counts: list[int] = []  # for each open bracket: sections so far if it is a list, else -1
    key = ""
    for token in _TOKEN.finditer(text):
        if token.group(2):
            key, start = str(json.loads(token.group(1))), token.start()
            place = Place(text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start))
            found[".".join([*path[1:], key])].append(place)
        elif token.group() in ("{", "["):
            if counts and counts[-1] >= 0:
                key = f"[{counts[-1]}]"
                counts[-1] += 1
            path.append(key)
            counts.append(0 if token.group() == "[" else -1)
        elif token.group() in ("}", "]"):
            path.pop()
            counts.pop()
    return dict(found)
