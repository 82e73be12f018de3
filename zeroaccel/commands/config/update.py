"""`zeroaccel config update`: a launch configuration of an older version becomes one of today's."""

from __future__ import annotations

from collections.abc import Sequence

from zeroaccel.commands.arguments import OneLineParser
from zeroaccel.commands.config.file_option import add_config_file, parse
from zeroaccel.config import launch_file


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel config update`."""
    parser = OneLineParser(prog="zeroaccel config update", description="Rewrite a file of an older version as today's.")
    add_config_file(parser, "file to rewrite")
    path = parse(parser, argv).config_file
    launch_file.update(path)
    print(f"Updated: {path}")
    return 0
