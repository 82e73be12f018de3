"""`zeroaccel test`: trains a few steps on every ZeRO stage on this machine, and compares with plain PyTorch."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

from zeroaccel.commands import launch, launch_options
from zeroaccel.commands.arguments import OneLineParser, add_option, number
from zeroaccel.commands.launch_settings import settle

PASSED = "passed"


def test_command_parser() -> OneLineParser:
    """The parser of `zeroaccel test`."""
    parser = OneLineParser(
        prog="zeroaccel test",
        usage="zeroaccel test [options]",
        description=(
            "Train a small model for a few steps on every ZeRO stage, on the GPUs of this machine or on two CPU ranks,"
            "\nand compare with plain PyTorch. What the launch configuration asks for is trained as well."
        ),
        epilog="Exit status: 0 if all agrees, 1 if something differs or fails.",
    )
    add_option(parser, parser, "--config_file", metavar="FILE", help="launch configuration, as for `zeroaccel launch`")
    add_option(parser, parser, "--num_processes", type=number(int, 1), metavar="N", help="ranks")
    add_option(parser, parser, "--cpu", action="store_true", help="stay on the CPU even if there are GPUs")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel test`; returns its exit status."""
    return test_command(test_command_parser().parse_args(argv))


def test_command(args: argparse.Namespace) -> int:
    """Does what the options of `test_command_parser` ask for; returns 0 if everything agrees with plain PyTorch.

    Raises:
        ConfigError: what was asked for cannot start.
    """
    arguments = [] if args.config_file is None else ["--config_file", args.config_file]
    arguments += ["--cpu"] if args.cpu else []
    arguments += ["--num_processes", str(args.num_processes or _ranks(arguments))]
    with tempfile.TemporaryDirectory(prefix="zeroaccel-test-") as folder:
        verdict = os.path.join(folder, "verdict")
        if status := launch.run([*arguments, "-m", "zeroaccel.commands.selftest_rank", verdict]):
            return status
        with open(verdict) as file:
            return 0 if file.read() == PASSED else 1


def _ranks(arguments: list[str]) -> int:
    """What the launch configuration says; else one rank a GPU; on the CPU two, so that there is something to split."""
    settings = settle(launch_options.parse([*arguments, "-m", "zeroaccel"]))
    if settings.options.num_processes is not None:
        return int(settings.options.num_processes)
    if settings.options.cpu:
        return 2
    from zeroaccel.commands import launch_elastic

    return launch_elastic.device_count() or 2


def main() -> int:
    """`zeroaccel test` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["test", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
