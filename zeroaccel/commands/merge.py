"""`zeroaccel merge-weights`: from a checkpoint of a training run to files that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from zeroaccel.commands.arguments import OneLineParser, add_option, number
from zeroaccel.config.generic import convert_file_size_to_int
from zeroaccel.errors import ConfigError


def merge_command_parser() -> OneLineParser:
    """The parser of `zeroaccel merge-weights`."""
    parser = OneLineParser(
        prog="zeroaccel merge-weights",
        usage="zeroaccel merge-weights CHECKPOINT OUTPUT [options]",
        description="Puts the weights of a checkpoint of any number of ranks and any ZeRO stage together.",
        epilog="It needs no GPU, and little memory. Options work with dashes, too.",
    )
    parser.add_argument(
        "checkpoint_directory", metavar="CHECKPOINT", help="folder that save_state or DeepSpeed's save_checkpoint wrote"
    )
    parser.add_argument("output_path", metavar="OUTPUT", help="folder for the weights")
    group = parser.add_argument_group("options")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (default: fp32)")
    add("--max_shard_size", type=_size, default="10GB", metavar="SIZE", help="of a file (default: 10GB)")
    add("--unsafe_serialization", action="store_true", default=False, help="write .bin files, not .safetensors")
    add("--exclude_frozen_parameters", action="store_true", default=False, help="leave out what needed no gradient")
    add("--tag", "-t", metavar="TAG", help="of DeepSpeed's checkpoint (default: the one that `latest` names)")
    add("--model", type=number(int, 0), default=0, metavar="N", help="which one, if several were saved (default: 0)")
    add(
        "--remove_checkpoint_dir",
        action="store_true",
        default=False,
        help="remove the checkpoint once the weights are written: training cannot go on from them",
    )
    return parser


def _size(text: str) -> int:
    """A value type: bytes, as a number or such as 5GB."""
    try:
        return convert_file_size_to_int(int(text) if text.isdigit() else text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel merge-weights`; returns its exit status."""
    return merge_command(merge_command_parser().parse_args(argv))


def merge_command(args: argparse.Namespace) -> int:
    """Does what the options of `merge_command_parser` ask for.

    Raises:
        ConfigError: an argument cannot be.
        CheckpointError: the checkpoint is damaged, or the weights cannot be written; nothing is removed then.
    """
    source, target = os.path.realpath(args.checkpoint_directory), os.path.realpath(args.output_path)
    if args.remove_checkpoint_dir and os.path.commonpath([source, target]) == source:
        raise ConfigError(
            "--remove_checkpoint_dir would remove the weights, too: name an output outside of"
            f" {args.checkpoint_directory}"
        )
    from zeroaccel.checkpoint.consolidate import consolidate

    names = consolidate(
        args.checkpoint_directory,
        args.output_path,
        args.dtype,
        args.max_shard_size,
        not args.unsafe_serialization,
        tag=args.tag,
        model=args.model,
        exclude_frozen_parameters=args.exclude_frozen_parameters,
    )
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    print(f"{len(names)} file{'s' * (len(names) > 1)} in {args.output_path}: {shown}")
    if args.remove_checkpoint_dir:
        shutil.rmtree(source)
    return 0


def main() -> int:
    """`zeroaccel merge-weights` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["merge-weights", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
