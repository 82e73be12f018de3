"""A rank's script runs as plain Python runs it: names, arguments, import path, and what outlives it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# What a script sees of itself; its class is pickled by a thread and by an exit function, after its last line.
SOURCE = """
import atexit, dataclasses, os, pickle, sys, threading, time

@dataclasses.dataclass
class Item:
    x: int

def check():
    assert pickle.loads(pickle.dumps(Item(3))) == Item(3)
    print("pickled")

def later():
    time.sleep(0.2)
    check()

atexit.register(check)
threading.Thread(target=later).start()
spec = __spec__ and (__spec__.name, __spec__.origin)
print(__name__, __package__, __file__, spec, sys.argv, sys.path[0], __builtins__ is not None, sep="\\n")
sys.exit(4)
"""
RANK = ["-m", "zeroaccel.commands.launch_rank"]
WAYS = {
    "a file": ("folder/script.py",),
    "a link": ("link.py",),
    "a file without a suffix": ("plain",),
    "a folder": ("folder",),
    "a zip file": ("packed.zip",),
    "a package": ("-m", "folder"),
    "a module": ("-m", "folder.script"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_script_is_what_python_makes_of(way: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/__init__.py", "folder/__main__.py", "folder/script.py", "plain"):
        (tmp_path / name).write_text("" if "__init__" in name else SOURCE)
    (tmp_path / "link.py").symlink_to("folder/script.py")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("__main__.py", SOURCE)
    plain, rank = (_run([*program, *WAYS[way], "--lr", "a b"], tmp_path) for program in ([], RANK))
    assert rank == plain
    status, out, _ = plain
    assert (status, out.count("pickled")) == (4, 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "ImportError: there is no module nowhere"),
        ("json.nowhere", "ImportError: there is no module json.nowhere"),
        ("email", "ImportError: there is no module email.__main__"),
        ("_struct", "ImportError: _struct is no Python code: "),
    ],
)
def test_a_module_that_cannot_be_run_is_one_line(name: str, told: str, tmp_path: Path) -> None:
    status, _, err = _run([*RANK, "-m", name], tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(told)


def _run(words: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit status and output of Python, with these words behind it."""
    note = folder / "0" / "error.json"
    note.parent.mkdir(exist_ok=True)
    variables = {"TORCHELASTIC_ERROR_FILE": str(note)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
