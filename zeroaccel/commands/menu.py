"""Questions in a terminal: a menu moved by arrow keys where there is one, numbered prompts where there is not."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from zeroaccel.errors import ConfigError

Answer = TypeVar("Answer")

_STEPS = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1}
_ENTER = ("\r", "\n")
_HIDE_CURSOR, _SHOW_CURSOR, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[K", "\x1b[J"
_SEQUENCE_GAP = 0.05  # seconds: the rest of an arrow key's sequence follows its Escape at once


def ask(question: str, convert: Callable[[str], Answer], default: str = "", shown: str | None = None) -> Answer:
    """A line of text, asked for until `convert` takes it.

    Args:
        question: without punctuation behind it.
        convert: makes the answer of the text; what it cannot take it refuses by an `argparse.ArgumentTypeError`.
        default: the text that Enter alone stands for; without one, Enter alone goes to `convert` as "".
        shown: how the default is shown, if not as it is.

    Raises:
        ConfigError: the input ends.
    """
    brackets = shown or default
    while True:
        _write(f"{question} [{brackets}]: " if brackets else f"{question}: ")
        line = _line()
        if not line:
            _write("\n")
            raise ConfigError("the answers ended before the questions: nothing was written")
        if not sys.stdin.isatty():
            _write(line.rstrip("\n") + "\n")  # nobody typed it where it would be seen
        try:
            return convert(line.strip() or default)
        except argparse.ArgumentTypeError as error:
            _write(f"  {error}\n")


def choose(question: str, choices: Sequence[str], default: int = 0) -> int:
    """The number, from 0, of one of `choices`.

    Without a terminal the number is read, or the choice itself.

    Raises:
        ConfigError: the input ends.
    """
    if _has_terminal(len(choices)):
        return _by_arrows(question, choices, default)
    words = [choice.lower() for choice in choices]

    def convert(text: str) -> int:
        if text.lower() in words:
            return words.index(text.lower())
        if text.isdecimal() and int(text) < len(choices):
            return int(text)
        raise argparse.ArgumentTypeError(f"got {text!r}, write a number, 0 to {len(choices) - 1}")

    _write("".join(f"{line}\n" for line in [question, *(f"  {n:>2}  {choice}" for n, choice in enumerate(choices))]))
    return ask("Number", convert, str(default))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _line() -> str:
    """A line with its end; "" where the input ends."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    line = b""  # byte by byte: what was typed ahead is the next menu's
    while not line.endswith(b"\n") and (key := os.read(sys.stdin.fileno(), 1)):
        line += key
    return line.decode(errors="replace")


def _has_terminal(choices: int) -> bool:
    """Whether a menu of so many lines can be drawn and moved."""
    return (
        sys.platform != "win32"
        and sys.stdin.isatty()
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
        and shutil.get_terminal_size().lines > choices + 1
    )


def _by_arrows(question: str, choices: Sequence[str], default: int) -> int:
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    _write(f"{question} (arrow keys, Enter)\n{_HIDE_CURSOR}")
    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)  # what was typed ahead stays
        chosen = _moved(terminal, choices, default)
        _write(f"\x1b[{len(choices)}A{_CLEAR_BELOW}  {choices[chosen]}\n")
        return chosen
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        _write(_SHOW_CURSOR)


def _moved(terminal: int, choices: Sequence[str], at: int) -> int:
    """Draws the menu and moves its arrow until Enter."""
    width = shutil.get_terminal_size().columns - 3
    drawn = False
    while True:
        rows = "".join(
            f"\r{_CLEAR_LINE}{'>' if number == at else ' '} {choice[:width]}\n" for number, choice in enumerate(choices)
        )
        _write(f"\x1b[{len(choices)}A{rows}" if drawn else rows)
        drawn = True
        key = _key(terminal)
        if key in _ENTER:
            return at
        if key in _STEPS:
            at = (at + _STEPS[key]) % len(choices)
        elif key.isdecimal() and int(key) < len(choices):
            at = int(key)


def _key(terminal: int) -> str:
    """One key, an arrow as its whole sequence."""
    key = os.read(terminal, 1)
    if key in (b"", b"\x04"):  # hung up, or Ctrl-D
        raise ConfigError("the answers ended before the questions: nothing was written")
    while key.startswith(b"\x1b") and len(key) < 3 and select.select([terminal], [], [], _SEQUENCE_GAP)[0]:
        key += os.read(terminal, 1)
    return key.decode(errors="replace")
