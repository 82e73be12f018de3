"""How long the command line takes: `--help` of every command, and what `launch` adds to torchrun's own start.

`python benchmarks/startup.py [--rounds N]` runs zeroaccel, accelerate and torchrun in turn, on the CPU, and prints two
Markdown tables: medians in seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zeroaccel.commands.main import COMMANDS

PROGRAMS = Path(sys.executable).parent
ZEROACCEL, ACCELERATE, TORCHRUN = (str(PROGRAMS / name) for name in ("zeroaccel", "accelerate", "torchrun"))
# Accelerate's commands; those of ours that it lacks have no number.
ACCELERATES = ("config", "env", "estimate-memory", "launch", "merge-weights", "test")

SCRIPT = "import os\nassert os.environ['WORLD_SIZE'] == '2'\n"
# What starts two ranks that do nothing. Accelerate's launcher through torchrun is the one with --use_deepspeed.
LAUNCHERS = {
    "torchrun": (TORCHRUN, "--standalone", "--nproc_per_node=2"),
    "zeroaccel launch": (ZEROACCEL, "launch", "--cpu", "--use_deepspeed", "--num_processes", "2"),
    "accelerate launch": (
        *(ACCELERATE, "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ),
}


def seconds(commands: dict[str, tuple[str, ...]], rounds: int, folder: str) -> dict[str, float]:
    """Median time on the clock of each command, run in turn."""
    variables = {**os.environ, "HF_HOME": folder, "ZEROACCEL_HOME": folder, "OMP_NUM_THREADS": "1"}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, env=variables, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def help_table(rounds: int, folder: str) -> str:
    """`--help` of every command."""
    names = ["", *COMMANDS]
    ours = {f"zeroaccel {name}": (ZEROACCEL, *name.split(), "--help") for name in names}
    theirs = {f"accelerate {name}": (ACCELERATE, *name.split(), "--help") for name in ("", *ACCELERATES)}
    taken = seconds(ours | theirs, rounds, folder)
    rows = ["| `--help` of | zeroaccel, s | accelerate, s |", "|---|---|---|"]
    for name in names:
        other = taken.get(f"accelerate {name}")
        shown = "" if other is None else f"{other:.2f}"
        rows.append(f"| {name or 'the program'} | {taken[f'zeroaccel {name}']:.2f} | {shown} |")
    return "\n".join(rows)


def launch_table(rounds: int, folder: str) -> str:
    """Two ranks that do nothing, from the command to its end."""
    script = Path(folder, "nothing.py")
    script.write_text(SCRIPT)
    commands = {name: (*command, str(script)) for name, command in LAUNCHERS.items()}
    taken = seconds(commands, rounds, folder)
    rows = ["| two ranks that do nothing | s | beyond torchrun, s |", "|---|---|---|"]
    for name, value in taken.items():
        rows.append(f"| {name} | {value:.2f} | {value - taken['torchrun']:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        print(help_table(rounds, folder), launch_table(rounds, folder), sep="\n\n")


if __name__ == "__main__":
    main()
