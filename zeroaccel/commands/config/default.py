"""`zeroaccel config default`: a launch configuration for this machine, without questions."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zeroaccel.commands.arguments import OneLineParser, add_option
from zeroaccel.commands.config.file_option import add_config_file, parse
from zeroaccel.config import launch_file
from zeroaccel.config.types import PrecisionType
from zeroaccel.errors import ConfigError


def run(argv: Sequence[str]) -> int:
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
    add_config_file(parser, "file to write, if it is not there")
    options = parse(parser, argv)
    if written := write_basic_config(options.mixed_precision, options.config_file):
        print(f"Written: {written}")
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
