"""Entry point of `zeroaccel`: finds the sub-command and turns our errors into one line and exit status 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import zeroaccel
from zeroaccel.commands.arguments import OneLineParser
from zeroaccel.errors import ZeroAccelError

# name -> (module with `run(argv) -> exit status`, line of the help)
COMMANDS = {
    "config": ("zeroaccel.commands.config", "answer questions, write the configuration that launch reads"),
    "launch": ("zeroaccel.commands.launch", "start a training script on every device of this machine"),
    "env": ("zeroaccel.commands.env", "what is installed here, and which of DeepSpeed's ops are ready"),
    "estimate-memory": ("zeroaccel.commands.estimate", "what training a model needs of GPUs and hosts"),
    "merge-weights": ("zeroaccel.commands.merge", "put the weights of a checkpoint together"),
    "test": ("zeroaccel.commands.test", "train on every ZeRO stage here, compare with plain PyTorch"),
}


def _parser() -> OneLineParser:
    listed = "\n".join(f"  {name:<16} {line}" for name, (_, line) in COMMANDS.items())
    parser = OneLineParser(
        prog="zeroaccel",
        usage="zeroaccel COMMAND [options]",
        description="A plain PyTorch loop on DeepSpeed ZeRO.",
        epilog=f"commands:\n{listed}\n\n`zeroaccel COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action="version", version=f"zeroaccel {zeroaccel.__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; default: `sys.argv[1:]`.

    Returns:
        Exit status: the command's own; 2 if what was asked for cannot start; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    if arguments[0].startswith("-"):
        parser.parse_args(arguments)  # answers --help and --version, refuses the rest
    name = arguments[0]
    if name not in COMMANDS:
        parser.error(f"no command is called {name!r}: write one of {', '.join(COMMANDS)}")
    command = importlib.import_module(COMMANDS[name][0])
    try:
        return int(command.run(arguments[1:]))
    except ZeroAccelError as error:
        print(f"zeroaccel {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
