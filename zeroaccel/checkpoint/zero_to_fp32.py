"""`zero_to_fp32.py`, which lies in every checkpoint of `save_state`, with the arguments of DeepSpeed's script."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from zeroaccel.checkpoint.files import replacing
from zeroaccel.errors import ZeroAccelError

NAME = "zero_to_fp32.py"
_SCRIPT = """#!/usr/bin/env python
# The weights of this checkpoint in fp32:  python zero_to_fp32.py . OUTPUT
from zeroaccel.checkpoint.zero_to_fp32 import main

main()
"""


def put_script(folder: str) -> None:
    """Puts the script into a checkpoint."""
    with replacing(os.path.join(folder, NAME)) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(_SCRIPT)
        os.chmod(temporary, 0o755)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a checkpoint's weights in fp32.

    Args:
        argv: arguments after the program's name; default: the program's own.
    """
    parser = argparse.ArgumentParser(prog=NAME, description="Writes the weights of a checkpoint in fp32.")
    parser.add_argument("checkpoint_dir", help="folder of the checkpoint")
    parser.add_argument("output_dir", help="folder for the weights")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file (default: 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write .safetensors, not .bin files")
    parser.add_argument("-t", "--tag", help="of DeepSpeed's checkpoint; default: the one that `latest` names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what needed no gradient")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted; there is nothing more to tell")
    options = parser.parse_args(argv)
    from zeroaccel.checkpoint.consolidate import consolidate

    try:
        names = consolidate(
            options.checkpoint_dir,
            options.output_dir,
            "fp32",
            options.max_shard_size,
            options.safe_serialization,
            tag=options.tag,
            exclude_frozen_parameters=options.exclude_frozen_parameters,
        )
    except ZeroAccelError as error:
        parser.error(str(error))
    print(f"{options.output_dir}: {', '.join(names)}")
