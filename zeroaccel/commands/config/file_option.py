"""The option `--config_file` of `zeroaccel config` and of its sub-commands that write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from zeroaccel.commands.arguments import OneLineParser, add_option
from zeroaccel.config import launch_file
from zeroaccel.errors import ConfigError


def add_config_file(parser: OneLineParser, what: str) -> None:
    """Adds `--config_file`."""
    default = "$ZEROACCEL_HOME/default_config.yaml, else in ~/.cache/zeroaccel"
    add_option(parser, parser, "--config_file", metavar="FILE", help=f"{what} (default: {default})")


def parse(parser: OneLineParser, argv: Sequence[str]) -> Any:
    """The options, with the path of `config_file` as it is."""
    options = parser.parse_args(argv)
    options.config_file = os.path.expanduser(options.config_file or launch_file.default_path())
    return options


def refuse_unwritable(path: str) -> None:
    """Tells before the questions, not after them, that their answers would be lost.

    Raises:
        ConfigError: no file can be written there.
    """
    if os.path.isdir(path):
        raise ConfigError(f"--config_file {path} is a folder: name a file in it")
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK) or not (os.path.isdir(folder) or os.path.isfile(path)):
        raise ConfigError(f"--config_file {path} cannot be written: {folder} stands in its way")
