"""The launch configuration: the YAML file that `zeroaccel config` writes and `zeroaccel launch` reads.

The file is nested, as Accelerate's (launch_schema.py); its content is handed out as one flat mapping from the
launcher's option names to values.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from zeroaccel.config import environment
from zeroaccel.config.document import Place
from zeroaccel.config.launch_schema import DEFAULTS, OTHER_TYPES, PLACES, SCHEMA, TOP_LEVEL, TYPES, UNSAID, Key
from zeroaccel.errors import ConfigError


def default_path() -> str:
    """`default_config.yaml` in `$ZEROACCEL_HOME`, else in `~/.cache/zeroaccel`."""
    home = environment.text("HOME") or os.path.join("~", ".cache", "zeroaccel")
    return os.path.join(os.path.expanduser(home), "default_config.yaml")


def read(path: str) -> dict[str, Any]:
    """The launcher's options that a file gives, by name; those of `deepspeed_config` and `dynamo_config` among them.

    What the file does not say is not there: neither keys without a value, nor a flag that is false.

    Raises:
        ConfigError: there is no such file, it is no YAML mapping, or a line for each key that cannot work.
    """
    return {option: value for option, (value, _) in _Reading(_load(path)).options.items()}


def lines(path: str) -> dict[str, int]:
    """The line, from 1, that gives each of the options of `read`."""
    return {option: place.line for option, place in places(path).items()}


def places(path: str) -> dict[str, Place]:
    """The place that gives each of the options of `read`."""
    return {option: place for option, (_, place) in _Reading(_load(path)).options.items()}


def write(path: str, answers: Mapping[str, Any]) -> None:
    """Writes a file that gives `answers`, in Accelerate's schema; as JSON where the path ends in `.json`.

    Args:
        path: file to write, with the folders that it lacks.
        answers: options as `read` names them. What is left out is left to the launcher.

    Raises:
        ConfigError: it cannot be written there.
    """
    nested: dict[str, Any] = {**DEFAULTS, "distributed_type": _type_of(answers)}
    for option, value in answers.items():
        if option in PLACES:
            section, name = PLACES[option]
            (nested.setdefault(section, {}) if section else nested)[name] = value
    dump(path, nested, as_json=path.endswith(".json"))


def document(path: str) -> dict[str, Any]:
    """What a file of any version says, nested as in today's: keys renamed, empty ones dropped.

    Raises:
        ConfigError: as in `read`.
    """
    file = _load(path)
    reading = _Reading(file)
    given = {option: value for option, (value, _) in reading.options.items()}
    gone = {"fp16", "dynamo_backend", "ipex_config", "tp_config"}
    kept = {name: value for name, value in file.values.items() if value not in (None, {}) and name not in gone}
    kept["distributed_type"] = reading.distributed_type
    if "mixed_precision" in given:
        kept["mixed_precision"] = given["mixed_precision"]
    if given.get("dynamo_backend", "NO") != "NO":
        kept["dynamo_config"] = {name: given[name] for name in SCHEMA["dynamo_config"] if name in given}
    return kept


def update(path: str) -> None:
    """Rewrites a file of any version as today's, as `document` has it, with the keys that it lacks.

    Raises:
        ConfigError: `read` would refuse it, or it cannot be written.
    """
    dump(path, {**DEFAULTS, **UNSAID, **document(path)}, as_json=path.endswith(".json"))


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file as it stands.

    Attributes:
        path: its name.
        values: its content, nested.
        places: each dotted key with its place, in order; one that is there twice is here twice.
    """

    path: str
    values: dict[str, Any]
    places: list[tuple[str, Place]]


def _load(path: str) -> _File:
    try:
        with open(path, encoding="utf-8") as file:
            loader = yaml.SafeLoader(file.read())
        node = loader.get_single_node()
        found = list(_key_places(node))
        values = None if node is None else loader.construct_document(node)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no launch configuration {path!r}: name another one, or answer the questions of"
            " `zeroaccel config` to write it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text; 2024-13-01
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{path}: a launch configuration is a YAML mapping (`distributed_type: DEEPSPEED`, ...), this is {what}"
        )
    return _File(path, {str(key): value for key, value in values.items()}, found)


def _key_places(node: yaml.Node | None, section: str = "") -> Iterator[tuple[str, Place]]:
    """Dotted keys with their places, one level of sections deep."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        yield f"{section}{key.value}", Place(key.start_mark.line + 1, key.start_mark.column + 1)
        if not section:
            yield from _key_places(value, f"{key.value}.")


class _Reading:
    """What a file says.

    Attributes:
        options: the launcher's options that it gives: value and place.
        distributed_type: one of `TYPES`.

    Raises:
        ConfigError: all that cannot work in it.
    """

    def __init__(self, file: _File) -> None:
        self.options: dict[str, tuple[Any, Place]] = {}
        self.distributed_type = ""
        self._file = file
        self._places = dict(file.places)
        self._problems: list[tuple[Place, str]] = []
        for dotted, count in Counter(dotted for dotted, _ in file.places).items():
            if count > 1:
                self._blame(dotted, f"is there {count} times: keep one of them")
        self._read_type()
        for section, keys in SCHEMA.items():
            for name, value in (self._section(section) if section else file.values).items():
                self._read_key(section, str(name), value, keys)
        self._refuse_what_we_lack()
        if self._problems:
            raise ConfigError.join([problem for _, problem in sorted(self._problems)])

    def _place(self, dotted: str) -> Place:
        return self._places.get(dotted, Place(1, 1))  # one that came in through a YAML merge, or that is missing

    def _blame(self, dotted: str, problem: str) -> None:
        place = self._place(dotted)
        self._problems.append((place, f"{self._file.path}:{place.line}:{place.column}: {dotted} {problem}"))

    def _section(self, name: str) -> dict[Any, Any]:
        values = self._file.values.get(name)
        if values is None or isinstance(values, dict):
            return values or {}
        self._blame(name, f"is {values!r}: write its keys below it, or leave it away")
        return {}

    def _read_type(self) -> None:
        given = self._file.values.get("distributed_type")
        kind = "NO" if given is False else str(given)  # YAML reads an unquoted NO as false
        if given is None:
            self._blame("distributed_type", "is missing: add `distributed_type: DEEPSPEED`")
        elif kind in OTHER_TYPES:
            self._blame(
                "distributed_type",
                f"is {kind}, which this library does not do: write DEEPSPEED, whose ZeRO splits optimizer states,"
                " gradients and weights",
            )
        elif kind not in TYPES:
            self._blame("distributed_type", f"is {given!r}: write one of {', '.join(TYPES)}")
        else:
            self.distributed_type = kind
            place = self._place("distributed_type")
            self.options.update({option: (value, place) for option, value in TYPES[kind].items()})

    def _read_key(self, section: str, name: str, value: Any, keys: Mapping[str, Key]) -> None:
        dotted = f"{section}.{name}" if section else name
        if name not in keys:
            if section or name not in TOP_LEVEL:
                self._blame(dotted, f"is no key of a launch configuration: {_remedy(section, name)}")
            return
        key = keys[name]
        if value is None or (name == "fp16" and self._file.values.get("mixed_precision") is not None):
            return
        try:
            converted = key.kind.convert(value)
        except (ValueError, TypeError):
            self._blame(dotted, f"is {value!r}: write {key.kind.wanted}")
            return
        if converted is not None:
            self.options[key.option] = (converted, self._place(dotted))

    def _refuse_what_we_lack(self) -> None:
        where = self._file.values.get("compute_environment")
        if where not in (None, "LOCAL_MACHINE"):
            self._blame("compute_environment", f"is {where!r}: write LOCAL_MACHINE, nothing else can be launched on")
        plain = self.distributed_type not in ("", "DEEPSPEED")
        if plain and any(value is not None for value in self._section("deepspeed_config").values()):
            self._blame(
                "deepspeed_config",
                f"is given, but distributed_type is {self.distributed_type}: write `distributed_type: DEEPSPEED`, or"
                " remove deepspeed_config",
            )
        if self._section("mpirun_config").get("mpirun_hostfile"):
            self._blame(
                "mpirun_config",
                "asks for mpirun: use DeepSpeed's launcher for it, by `deepspeed_multinode_launcher: openmpi` and"
                " `deepspeed_hostfile` below deepspeed_config",
            )
        for section in ("parallelism_config", "tp_config"):
            sizes = [value for name, value in self._section(section).items() if str(name).endswith("_size")]
            if any(size not in (None, 1) for size in sizes):
                self._blame(section, "splits the ranks into groups, which this library does not do: remove it")


def _remedy(section: str, name: str) -> str:
    """What to write in place of an unknown key."""
    for home, keys in SCHEMA.items():
        if name in keys and home != section:
            return f"it belongs below {home}" if home else "it belongs to the top level"
    near = difflib.get_close_matches(name, sorted(SCHEMA[section] if section else TOP_LEVEL), n=1)
    return f"did you mean {near[0]}?" if near else "remove it"


# --- writing ------------------------------------------------------------------------------------------------------


def _type_of(answers: Mapping[str, Any]) -> str:
    if answers.get("use_deepspeed"):
        return "DEEPSPEED"
    if answers.get("multi_gpu"):
        return "MULTI_GPU"
    return "MULTI_CPU" if answers.get("cpu") and answers.get("num_processes", 1) > 1 else "NO"


def dump(path: str, nested: Mapping[str, Any], as_json: bool) -> None:
    """Writes a nested configuration, with the folders that the path lacks.

    Raises:
        ConfigError: it cannot be written there.
    """
    text = json.dumps(nested, indent=2, sort_keys=True) + "\n" if as_json else yaml.safe_dump(dict(nested))
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
