"""`zeroaccel config`: asks, and writes the file that `zeroaccel launch` reads. Each sub-command has its own file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from zeroaccel.commands.arguments import OneLineParser
from zeroaccel.commands.config.config_args import default_config_file as default_config_file
from zeroaccel.commands.config.config_args import load_config_from_file as load_config_from_file
from zeroaccel.commands.config.file_option import add_config_file, parse, refuse_unwritable
from zeroaccel.config import launch_file

# name -> line of the help; the file of the same name has `run(argv) -> exit status`.
SUBCOMMANDS = {
    "default": "write a file for this machine without asking",
    "update": "rewrite a file of an older version as today's",
    "explain": "print every value that DeepSpeed would get, and why",
    "validate": "list the problems of configuration files",
}


def _parser() -> OneLineParser:
    listed = "\n".join(f"  {name:<16} {line}" for name, line in SUBCOMMANDS.items())
    parser = OneLineParser(
        prog="zeroaccel config",
        usage="zeroaccel config [--config_file FILE] | COMMAND [options]",
        description="Answer questions, and the answers become a file that `zeroaccel launch` reads.",
        epilog=f"commands:\n{listed}\n\n`zeroaccel config COMMAND --help` explains one.",
    )
    add_config_file(parser, "file to write; JSON if it ends in .json")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config` or one of its sub-commands; returns its exit status."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in SUBCOMMANDS:
            _parser().error(f"no sub-command is called {argv[0]!r}: write one of {', '.join(SUBCOMMANDS)}, or none")
        return int(importlib.import_module(f"{__name__}.{argv[0]}").run(argv[1:]))
    path = parse(_parser(), argv).config_file
    refuse_unwritable(path)
    from zeroaccel.commands.config.questions import ask_all

    launch_file.write(path, ask_all())
    print(f"Written: {path}")
    option = "" if path == launch_file.default_path() else f" --config_file {path}"
    print(f"To train with it: zeroaccel launch{option} SCRIPT")
    return 0


def main() -> int:
    """`zeroaccel config` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["config", *sys.argv[1:]])
