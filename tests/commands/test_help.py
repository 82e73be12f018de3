"""Help is quick: no command loads torch to explain itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zeroaccel.commands.config import SUBCOMMANDS
from zeroaccel.commands.main import COMMANDS

HELP = """
import sys
from zeroaccel.commands.main import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as stop:
    loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "deepspeed", "numpy", "transformers"}
    sys.exit(f"loaded: {loaded}" if loaded else stop.code)
"""
# Start-up of a torch-free command is measured in benchmarks/startup.py.


@pytest.mark.parametrize(
    "words", [(), *((name,) for name in COMMANDS), *(("config", name) for name in SUBCOMMANDS)], ids=" ".join
)
def test_help_loads_no_torch(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {' '.join(('zeroaccel', *words))}")
    assert "-h, --help" in done.stdout


def test_the_help_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "zeroaccel", "--help"], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.partition("commands:\n")[2].splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize(
    "program",
    [
        ("-m", "zeroaccel"),
        ("-m", "zeroaccel.commands.zeroaccel_cli"),
        ("-c", "import sys; from zeroaccel.commands.main import main; sys.exit(main())"),
    ],
    ids=" ".join,
)
def test_every_way_to_start_a_command_ends_with_its_status(program: tuple[str, ...]) -> None:
    command = [sys.executable, *program, "estimate-memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zeroaccel estimate-memory: error: name a model's folder")


@pytest.mark.parametrize(("name", "module"), [("env", "env"), ("estimate-memory", "estimate")])
def test_a_command_is_a_program_of_its_own(name: str, module: str) -> None:
    command = [sys.executable, "-m", f"zeroaccel.commands.{module}", "--no_such_option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"zeroaccel {name}: error: unknown option --no_such_option")
