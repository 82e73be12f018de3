"""Environment variables for scripts and test suites: reading any of them, changing them for a while."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from zeroaccel.config.environment import FALLBACK_PREFIX, PREFIX, parse_bool
from zeroaccel.errors import ConfigError

_logger = logging.getLogger("zeroaccel.utils.environment")  # the module that users know

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """What a word means: y, yes, t, true, on, 1 or n, no, f, false, off, 0, in any case.

    Args:
        value: the word.
        to_bool: give a `bool` instead of 1 or 0.

    Raises:
        ConfigError: another word, or none.
    """
    if value == "":
        raise ConfigError("an empty text is neither true nor false: write true or false")
    meaning = parse_bool(value, "the text")
    return meaning if to_bool else int(meaning)


def get_int_from_env(env_keys: Sequence[str], default: int) -> int:
    """Value of the first of these variables that is set to 0 or more, else `default`."""
    for name in env_keys:
        value = int(os.environ.get(name, -1))
        if value >= 0:
            return value
    return default


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Whether a variable is true; `default` where it is not set.

    Raises:
        ConfigError: its text means neither true nor false.
    """
    value = os.environ.get(key)
    if value == "":
        raise ConfigError(f"{key} is set to nothing, which is neither true nor false: write true or false")
    return default if value is None else parse_bool(value, key)


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """Text of a variable; `default` where it is not set."""
    return os.environ.get(key, str(default))


def convert_dict_to_env_variables(current_env: Mapping[str, str]) -> list[str]:
    """Lines `NAME=value` for an environment file such as DeepSpeed's `.deepspeed_env`.

    Left out, with a warning in the log, is what such a file cannot carry: nothing, spaces, line ends, `;`, `<` and `>`.
    """
    lines = []
    for name, value in current_env.items():
        if name and value and not set(";<> \n") & set(name + value):
            lines.append(f"{name}={value}\n")
        else:
            _logger.warning("an environment file cannot carry %s=%r: left out", name, value)
    return lines


@contextmanager
def _restored(chosen: Callable[[str], bool]) -> Iterator[None]:
    """Gives back, at the end, the variables whose name is `chosen` as they were."""
    before = {name: value for name, value in os.environ.items() if chosen(name)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if chosen(name) and name not in before]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def clear_environment() -> Iterator[None]:
    """Inside the block no environment variable is set; afterwards all are as before."""
    with _restored(lambda name: True):
        os.environ.clear()
        yield


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Inside the block these environment variables are set; afterwards they are as before.

    Args:
        kwargs: names, which are written in upper case, and values, which are written as text.
    """
    wanted = {name.upper(): str(value) for name, value in kwargs.items()}
    with _restored(wanted.__contains__):
        os.environ.update(wanted)
        yield


def purge_accelerate_environment(func_or_cls: Decorated) -> Decorated:
    """Decorator: what the function changes in this library's variables (and Accelerate's) is undone after it.

    Args:
        func_or_cls: a function; or a class, whose methods that begin with `test` are decorated, and those of its
            subclasses.
    """
    purged: Decorated = _purged_class(func_or_cls) if isinstance(func_or_cls, type) else _purged(func_or_cls)
    return purged


purge_zeroaccel_environment = purge_accelerate_environment  # what replacing the import name makes of the name


def _purged(function: Any) -> Any:
    if hasattr(function, "_is_purged"):
        return function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _restored(lambda name: name.startswith((PREFIX, FALLBACK_PREFIX))):
            return function(*args, **kwargs)

    wrapper._is_purged = True  # type: ignore[attr-defined]
    return wrapper


def _purged_class(cls: Any) -> Any:
    def decorate_tests(one: type) -> None:
        for name in dir(one):
            if name.startswith("test") and callable(getattr(one, name)):
                setattr(one, name, _purged(getattr(one, name)))

    def __init_subclass__(subclass: type, /, **kwargs: Any) -> None:
        super(cls, subclass).__init_subclass__(**kwargs)
        decorate_tests(subclass)

    decorate_tests(cls)
    cls.__init_subclass__ = classmethod(__init_subclass__)
    return cls
