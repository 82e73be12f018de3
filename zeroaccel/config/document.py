"""A DeepSpeed JSON config: from a path, a dictionary, JSON text or base64, with dotted access."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zeroaccel.errors import ConfigError, ConfigTypeError


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
        self.config, self.origin, self._lines = _read(config_file_or_dict)
        self.set_stage_and_offload()

    def source_of(self, ds_key_long: str) -> str:
        """Where a dotted key was written: the origin, of a file with the line."""
        line = self._lines.get(ds_key_long)
        return self.origin if line is None else f"{self.origin}:{line}"

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


def _read(source: object) -> tuple[dict[str, Any], str, dict[str, int]]:
    """The config, where it came from, and the lines of its keys where it is a file."""
    if isinstance(source, dict):
        return copy.deepcopy(source), "dict argument", {}
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigTypeError(
            f"hf_ds_config is a {type(source).__name__}: pass the path of a DeepSpeed config, a dictionary, JSON text"
            " or its base64"
        )
    text = str(source)
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as file:
            content = file.read()
        return _parsed(content, text), text, _key_lines(content)
    if text.lstrip().startswith("{"):
        return _parsed(text, "JSON text"), "JSON text", {}
    if (decoded := _decoded(text)) is None:
        raise ConfigError(
            f"hf_ds_config={text!r} is neither an existing file nor JSON: pass the path of a DeepSpeed config,"
            " a dictionary, JSON text or its base64"
        )
    return _parsed(decoded, "base64 text"), "base64 text", {}


def _decoded(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
        json.loads(decoded)
    except (binascii.Error, UnicodeError, ValueError):
        return None
    return decoded


def _parsed(text: str, origin: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"{origin}: {', '.join(twice)} is there twice in one section: keep one of them")
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{origin}: a DeepSpeed config is a JSON object, this is a {type(config).__name__}")
    return config


_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]')


def _key_lines(text: str) -> dict[str, int]:
    """Line of every dotted key of valid JSON text; keys inside lists are left out."""
    lines: dict[str, int] = {}
    path: list[str | None] = []  # the key of each open section, None for a list and for the whole
    key: str | None = None
    for token in _TOKEN.finditer(text):
        if token.group(2):
            key = json.loads(token.group(1))
            sections = path[1:]
            if None not in sections:
                lines[".".join([*filter(None, sections), str(key)])] = text.count("\n", 0, token.start()) + 1
        elif token.group() in ("{", "["):
            path.append(key if token.group() == "{" and path else None)
        elif token.group() in ("}", "]"):
            path.pop()
    return lines
