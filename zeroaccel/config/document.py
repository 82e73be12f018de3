"""A DeepSpeed JSON config: from a path, a dictionary, JSON text or base64, with dotted access."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
from typing import Any

from zeroaccel.errors import ConfigError


class HfDeepSpeedConfig:
    """A DeepSpeed config and questions about it.

    Args:
        config_file_or_dict: path of a JSON file, a dictionary (which is copied), JSON text, or its url-safe base64.

    Attributes:
        config: the dictionary; changing it changes what is trained.
        origin: where it came from, in words.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """

    def __init__(self, config_file_or_dict: dict[str, Any] | str | os.PathLike[str]) -> None:
        self.config, self.origin = _read(config_file_or_dict)
        self.set_stage_and_offload()

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
            node = node.get(section) if isinstance(node, dict) else None
            if node is None:
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


def _read(source: dict[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    if isinstance(source, dict):
        return copy.deepcopy(source), "dict argument"
    text, origin = os.fspath(source), "JSON text"
    if os.path.exists(text):
        origin = text
        with open(text, encoding="utf-8") as file:
            text = file.read()
    elif (decoded := _decoded(text)) is not None:
        text, origin = decoded, "base64 text"
    elif not text.lstrip().startswith("{"):
        raise ConfigError(
            f"hf_ds_config={text!r} is neither an existing file nor JSON: pass the path of a DeepSpeed config,"
            " a dictionary, JSON text or its base64"
        )
    return _parsed(text, origin), origin


def _decoded(text: str) -> str | None:
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
        json.loads(decoded)
    except (binascii.Error, UnicodeError, ValueError):
        return None
    return decoded


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{origin}: a DeepSpeed config is a JSON object, this is a {type(config).__name__}")
    return config
