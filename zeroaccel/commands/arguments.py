"""Parsing shared by the commands: one-line errors, both spellings of an option, value types with reasons."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from zeroaccel.config import environment
from zeroaccel.errors import ConfigError

Number = TypeVar("Number", int, float)


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line on stderr, without the usage, with exit status 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.spellings: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As `ArgumentParser.parse_args`, but an unknown option ends the program with the nearest known one."""
        options, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return options

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Ends the program if options are left over, with the nearest known one."""
        if not unknown:
            return
        typed = unknown[0].partition("=")[0]
        if not typed.startswith("-"):
            self.error(f"{typed!r} is one argument too many, see `{self.prog} --help`")
        near = difflib.get_close_matches(typed.replace("-", "_").lstrip("_"), self.spellings, n=1)
        hint = f": did you mean --{near[0]}?" if near else f", see `{self.prog} --help`"
        self.error(f"unknown option {typed}{hint}")


def add_option(parser: OneLineParser, group: Any, *names: str, **kwargs: Any) -> None:
    """Adds an option under its underscore names, and hidden from the help under their dash spelling.

    Nothing typed leaves `None`: what the user did not say is no wish of theirs.
    """
    kwargs.setdefault("default", None)
    dest = kwargs.setdefault("dest", names[0].lstrip("-"))
    group.add_argument(*names, **kwargs)
    dashed = [name for name in (_dashed(name) for name in names) if name not in names]
    if dashed:
        group.add_argument(*dashed, **{**kwargs, "help": argparse.SUPPRESS, "dest": dest})
    parser.spellings += [name.lstrip("-") for name in names if name.startswith("--")]


def _dashed(name: str) -> str:
    return name[:2] + name[2:].replace("_", "-")


def number(kind: Callable[[str], Number], lowest: Number, highest: Number | None = None) -> Callable[[str], Number]:
    """A value type: an int or float within bounds, both included."""
    wanted = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
    noun = "whole number" if kind is int else "number"

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"got {text!r}, write a {noun}, {wanted}")
        return value

    return parse


def count(text: str) -> int:
    """A value type: a whole number such as 7000000000, 7e9, 350M or 7B."""
    multiples = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)([KMBT]?)", text.replace("_", ""), flags=re.IGNORECASE)
    value = round(float(match[1]) * multiples[match[2].upper()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, write a number such as 350M, 7B or 7e9")
    return value


def boolean(text: str) -> bool:
    """A value type: true or false."""
    try:
        return environment.parse_bool(text, "the value")
    except ConfigError:
        raise argparse.ArgumentTypeError(f"got {text!r}, write true or false") from None
