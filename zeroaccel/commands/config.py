"""`zeroaccel config`: asks, and writes the file that `zeroaccel launch` reads."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from zeroaccel.commands.arguments import OneLineParser, add_option
from zeroaccel.config import launch_file
from zeroaccel.config.types import PrecisionType
from zeroaccel.errors import ConfigError

# name -> (module, function of the arguments, line of the help)
SUBCOMMANDS = {
    "default": (__name__, "run_default", "write a file for this machine without asking"),
    "update": (__name__, "run_update", "rewrite a file of an older version as today's"),
    "explain": ("zeroaccel.commands.explain", "run", "print every value that DeepSpeed would get, and why"),
    "validate": ("zeroaccel.commands.validate", "run", "list the problems of configuration files"),
}


def _parser() -> OneLineParser:
    listed = "\n".join(f"  {name:<16} {line}" for name, (_, _, line) in SUBCOMMANDS.items())
    parser = OneLineParser(
        prog="zeroaccel config",
        usage="zeroaccel config [--config_file FILE] | COMMAND [options]",
        description="Answer questions, and the answers become a file that `zeroaccel launch` reads.",
        epilog=f"commands:\n{listed}\n\n`zeroaccel config COMMAND --help` explains one.",
    )
    _add_config_file(parser, "file to write; JSON if it ends in .json")
    return parser


def _add_config_file(parser: OneLineParser, what: str) -> None:
    default = "$ZEROACCEL_HOME/default_config.yaml, else in ~/.cache/zeroaccel"
    add_option(parser, parser, "--config_file", metavar="FILE", help=f"{what} (default: {default})")


def _parse(parser: OneLineParser, argv: Sequence[str]) -> Any:
    options, unknown = parser.parse_known_args(argv)
    parser.refuse_unknown(unknown)
    options.config_file = os.path.expanduser(options.config_file or launch_file.default_path())
    return options


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config` or one of its sub-commands; returns its exit status."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in SUBCOMMANDS:
            _parser().error(f"no sub-command is called {argv[0]!r}: write one of {', '.join(SUBCOMMANDS)}, or none")
        module, function, _ = SUBCOMMANDS[argv[0]]
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    path = _parse(_parser(), argv).config_file
    _refuse_unwritable(path)
    from zeroaccel.commands.config_questions import ask_all

    launch_file.write(path, ask_all())
    print(f"Written: {path}")
    option = "" if path == launch_file.default_path() else f" --config_file {path}"
    print(f"To train with it: zeroaccel launch{option} SCRIPT")
    return 0


def _refuse_unwritable(path: str) -> None:
    """Tells before the questions, not after them, that their answers would be lost."""
    if os.path.isdir(path):
        raise ConfigError(f"--config_file {path} is a folder: name a file in it")
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK) or not (os.path.isdir(folder) or os.path.isfile(path)):
        raise ConfigError(f"--config_file {path} cannot be written: {folder} stands in its way")


def run_default(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config default`."""
    parser = OneLineParser(prog="zeroaccel config default", description="Write a file for this machine without asking.")
    add_option(
        parser,
        parser,
        "--mixed_precision",
        type=str.lower,
        choices=PrecisionType.list(),
        default="no",
        help="number format of the forward pass (default: no)",
    )
    _add_config_file(parser, "file to write, if it is not there")
    options = _parse(parser, argv)
    if written := write_basic_config(options.mixed_precision, options.config_file):
        print(f"Written: {written}")
    return 0


def run_update(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config update`."""
    parser = OneLineParser(prog="zeroaccel config update", description="Rewrite a file of an older version as today's.")
    _add_config_file(parser, "file to rewrite")
    path = _parse(parser, argv).config_file
    launch_file.update(path)
    print(f"Updated: {path}")
    return 0


def write_basic_config(mixed_precision: str = "no", save_location: str | os.PathLike[str] | None = None) -> str | bool:
    """Writes a launch configuration for this machine: a process for each of its accelerators, else one on the CPU.

    Args:
        mixed_precision: "no", "fp16", "bf16" or "fp8".
        save_location: file to write; default: where `zeroaccel launch` looks for one.

    Returns:
        The path; False, and a line on stdout, if there is such a file: it stays.

    Raises:
        ConfigError: there is no such precision, or the file cannot be written.
    """
    path = launch_file.default_path() if save_location is None else os.fspath(save_location)
    precision = mixed_precision.lower()
    if precision not in PrecisionType:
        raise ConfigError(f"mixed_precision={mixed_precision!r} is unknown: choose from {PrecisionType.list()}")
    if os.path.exists(path):
        print(f"{path} is there and stays as it is: remove it, or name another file")
        return False
    from zeroaccel.commands import launch_elastic

    devices = launch_elastic.device_count()
    answers = {"mixed_precision": precision, "num_processes": max(devices, 1), "cpu": devices == 0}
    launch_file.write(path, {**answers, "multi_gpu": devices > 1})
    return path
