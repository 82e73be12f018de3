"""Who wrote which value of a plugin's config, and what the config says once `prepare()` is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from zeroaccel.config.document import HfDeepSpeedConfig, assign, leaves

SCRIPT = "deepspeed_config[...] of the script"


class Provenance:
    """Remembers the values that the library put into a config: what differs from them, the script assigned.

    Assigning the very value that stands there already cannot be told from not assigning it.

    Attributes:
        sources, reasons: of the values that the library put, in words, by dotted key.
    """

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self._put: dict[str, Any] = {}
        self._asked: dict[str, Any] | None = None  # None until `prepare()` resolved something

    def note(self, config: Mapping[str, Any]) -> None:
        """Takes what stands in the config now for written by the library."""
        self._put = dict(leaves(config))

    @contextmanager
    def writing(self, config: Mapping[str, Any], source: str, reason: str = "") -> Iterator[None]:
        """What changes in the config inside is the library's, on behalf of `source`."""
        before = dict(leaves(config))
        yield
        written = {key: value for key, value in leaves(config) if key not in before or before[key] != value}
        self._put |= written
        self.sources |= dict.fromkeys(written, source)
        self.reasons |= dict.fromkeys(written, reason)
        if self._asked is not None:
            for key, value in written.items():
                assign(self._asked, key, value)

    def note_resolved(self, before: dict[str, Any], resolved: dict[str, Any]) -> None:
        """`prepare()` is about to show `resolved` instead of `before`."""
        self._asked = self.intent(before)
        self.sources |= dict.fromkeys(self._assigned(before), SCRIPT)
        self.note(resolved)

    def intent(self, config: dict[str, Any]) -> dict[str, Any]:
        """A copy of the config as it was asked for: `"auto"` again where only `prepare()` had put a value."""
        if self._asked is None:
            return copy.deepcopy(config)
        asked = copy.deepcopy(self._asked)
        for key, value in self._assigned(config).items():
            assign(asked, key, copy.deepcopy(value))
        now = dict(leaves(config))
        document = HfDeepSpeedConfig(asked)
        for key in self._put:
            if key not in now and not any(other.startswith(f"{key}.") for other in now):
                document.del_config_sub_tree(key)
        return document.config

    def source_of(self, key: str, config: dict[str, Any], stated: Callable[[str], str]) -> str:
        """Where the value of a dotted key comes from; `stated` says it for values of the user's document."""
        if key in self._assigned(config):
            return SCRIPT
        return self.sources.get(key) or stated(key)

    def reason_of(self, key: str, config: dict[str, Any]) -> str:
        """Why the library put the value of a dotted key; empty where somebody asked for it."""
        return "" if key in self._assigned(config) else self.reasons.get(key, "")

    def _assigned(self, config: Mapping[str, Any]) -> dict[str, Any]:
        missing = object()
        return {key: value for key, value in leaves(config) if self._put.get(key, missing) != value}
