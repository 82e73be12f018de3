"""What `zeroaccel launch` says when ranks fail, in real runs of two; and which rank is named where several failed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, is_alive, run
from zeroaccel.commands.launch_failures import advice, read, tell
from zeroaccel.commands.launch_memory import Memory

HOST = socket.gethostname()
FIRST = f"zeroaccel launch: rank 1 of 2 failed first on {HOST}: "
ON_TWO = (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2")
FAIL = str(SCRIPTS / "fail.py")
GIB = 2**30


HOWS = ("raise", "raise alike", "exit", "exit with a message", "kill", "vanish", "crash")


@dataclass(frozen=True)
class Failed:
    """A run that has failed.

    Attributes:
        status, err: as the shell sees them.
        pids: of rank 0, its child, rank 1, its child.
    """

    status: int
    err: str
    pids: list[int]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Failed]:
    """What a run of `fail.py HOW` came to; all of them run at once."""

    def fail(how: str) -> Failed:
        folder = tmp_path_factory.mktemp("run")
        result = run((*ON_TWO, FAIL, how, str(folder)), folder)
        files = [folder / f"pids{rank}" for rank in (0, 1)]
        pids = [int(pid) for file in files if file.exists() for pid in file.read_text().split()]
        return Failed(result.status, result.err, pids)

    pool = ThreadPoolExecutor(3)
    runs = {how: pool.submit(fail, how) for how in HOWS}
    pool.shutdown(wait=False)
    return lambda how: runs[how].result()


@pytest.mark.parametrize("how", HOWS)
def test_nobody_is_left_behind_after(how: str, failed: Callable[[str], Failed]) -> None:
    pids = failed(how).pids
    assert pids
    assert not [pid for pid in pids if is_alive(pid)]


# --- real runs --------------------------------------------------------------------------------------------------


def test_the_script_that_raises_is_told_once_with_its_rank(failed: Callable[[str], Failed]) -> None:
    result = failed("raise")
    assert result.status == 1
    # Rank 0 fails, too, in its collective: the news is rank 1's exception.
    assert result.err.count("Traceback (most recent call last)") == 1
    assert result.err.count('raise ValueError("the loss is not a number")') == 1
    assert f"{FIRST}ValueError: the loss is not a number (exit status 1)\n" in result.err
    assert "launch_rank" not in result.err
    assert "runpy" not in result.err


def test_what_all_ranks_raise_is_told_once(failed: Callable[[str], Failed]) -> None:
    result = failed("raise alike")
    assert result.status == 1
    assert result.err.count("the loss is not a number") == 3  # the source line, the exception, the launcher's line
    told = [line for line in result.err.splitlines() if line.startswith("zeroaccel launch:")]
    assert "failed first" in told[0]
    assert told[1:] in (
        [],  # the launcher ended the other rank before it got there
        ["zeroaccel launch: rank 0 failed after it: the same"],
        ["zeroaccel launch: rank 1 failed after it: the same"],
    )


def test_the_exit_status_is_the_scripts(failed: Callable[[str], Failed]) -> None:
    result = failed("exit")
    assert result.status == 3
    assert result.err == f"{FIRST}sys.exit(3) (exit status 3)\n"


def test_the_message_of_an_exit_is_printed_once(failed: Callable[[str], Failed]) -> None:
    result = failed("exit with a message")
    assert result.status == 1
    assert result.err.startswith("there is no data\nzeroaccel launch: rank ")
    assert result.err.count("there is no data\n") == 1


def test_a_rank_killed_by_the_system_is_named_before_those_that_miss_it(failed: Callable[[str], Failed]) -> None:
    result = failed("kill")
    assert result.status == 128 + 9
    assert f"{FIRST}killed by SIGKILL (pid {result.pids[2]})\n" in result.err
    assert "zeroaccel launch: no sign of a lack of memory: the largest rank used 0." in result.err


def test_a_rank_that_goes_without_a_word_ends_those_that_wait_for_it(failed: Callable[[str], Failed]) -> None:
    result = failed("vanish")
    assert result.status == 7
    assert f"{FIRST}it ended with exit status 7, and noted no exception\n" in result.err


def test_a_crash_of_the_interpreter_shows_where_it_was(failed: Callable[[str], Failed]) -> None:
    result = failed("crash")
    assert result.status == 128 + 11
    assert result.err.count("Fatal Python error: Segmentation fault") == 1
    assert f'"{FAIL}", line ' in result.err
    assert f"{FIRST}killed by SIGSEGV (pid {result.pids[2]})\n" in result.err


EXCEPTIONS = {
    "the script's own hook prints it": (
        "import sys; sys.excepthook = lambda kind, error, trace: print(f'own: {error}'); 1 / 0",
        "own: division by zero\n",
        "ZeroDivisionError: division by zero",
    ),
    "notes are no summary": (
        "error = ValueError('first\\nsecond'); error.add_note('a note'); raise error",
        "",
        "ValueError: first",
    ),
    "a long one is cut": ("raise ValueError('x' * 999)", "", f"ValueError: {'x' * 285}..."),
    "a syntax error": ("def", "", "SyntaxError: invalid syntax"),
}


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_an_exception_is_summed_up_and_printed_by_the_hook(case: str, tmp_path: Path) -> None:
    source, printed, summary = EXCEPTIONS[case]
    (tmp_path / "script.py").write_text(source)
    note = tmp_path / "0" / "error.json"
    note.parent.mkdir()
    command = (ZEROACCEL_LAUNCH[0], "-m", "zeroaccel.commands.launch_rank", str(tmp_path / "script.py"))
    result = run(command, tmp_path, TORCHELASTIC_ERROR_FILE=str(note))
    assert (result.status, result.out) == (1, printed)
    assert json.loads(note.read_text())["message"]["message"] == summary
    again = run(command, tmp_path, TORCHELASTIC_ERROR_FILE=str(note))
    assert (again.status, again.out, again.err) == (1, "", "")


# --- who is named -----------------------------------------------------------------------------------------------

# What happened: for each rank its exit code and when it noted an exception (None: never), then the lines told
# and the exit status.
Failures = dict[int, tuple[int, int | None]]
CASES: dict[str, tuple[Failures, list[str], int]] = {
    "the earlier exception": (
        {0: (1, 20), 1: (2, 10)},
        ["rank 1 of 9 failed first: Error 10 (exit status 2)", "rank 0 failed after it: Error 20 (exit status 1)"],
        2,
    ),
    "a kill, whatever the others had time to note": (
        {0: (1, 10), 1: (-9, None)},
        ["rank 1 of 9 failed first: killed by SIGKILL (pid 71)", "rank 0 failed after it: Error 10 (exit status 1)"],
        137,
    ),
    "an end without a word": (
        {0: (1, 10), 2: (5, None)},
        [
            "rank 2 of 9 failed first: it ended with exit status 5, and noted no exception",
            "rank 0 failed after it: Error 10 (exit status 1)",
        ],
        5,
    ),
    "an exception, not the abort that it leads to": (
        {0: (-6, None), 3: (1, 10)},
        ["rank 3 of 9 failed first: Error 10 (exit status 1)", "rank 0 failed after it: killed by SIGABRT (pid 70)"],
        1,
    ),
    "no rank that the launcher itself ended": (
        {0: (-15, None), 1: (2, 10), 2: (-15, None)},
        ["rank 1 of 9 failed first: Error 10 (exit status 2)"],
        2,
    ),
    "a rank that raised, even if the launcher ended it while it was leaving": (
        {0: (1, 20), 1: (-15, 10)},
        ["rank 1 of 9 failed first: Error 10 (exit status 1)", "rank 0 failed after it: Error 20 (exit status 1)"],
        1,
    ),
    "a rank ended from outside, if there is no other": (
        {1: (-15, None)},
        ["rank 1 of 9 failed first: killed by SIGTERM (pid 71)"],
        143,
    ),
    "one, with few lines about many others": (
        {0: (1, 10), 1: (1, 10), 2: (1, 20), 3: (1, 20), 4: (1, 30), 5: (1, 40), 6: (1, 50)},
        [
            "rank 0 of 9 failed first: Error 10 (exit status 1)",
            "rank 1 failed after it: the same",
            "ranks 2, 3 failed after it: Error 20 (exit status 1)",
            "rank 4 failed after it: Error 30 (exit status 1)",
            "ranks 5, 6 failed, too",
        ],
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named_first_is(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures, lines, status = CASES[case]
    read_ones = [read(rank, each, str(tmp_path), 0.0) for rank, each in seen(failures, tmp_path).items()]
    assert tell(read_ones, world_size=9).status == status
    told = capsys.readouterr().err.replace(f" on {HOST}", "").splitlines()
    assert told == [f"zeroaccel launch: {line}" for line in lines]


def seen(failures: Failures, folder: Path) -> dict[int, ProcessFailure]:
    """What torch's launcher sees, with the files that ranks write."""
    found = {}
    for rank, (exit_code, noted) in failures.items():
        file = folder / f"rank{rank}.json"
        if noted is not None:
            extra = {"py_callstack": "", "timestamp": "0"}
            status = max(exit_code, 1)
            message = {"message": f"Error {noted}", "extraInfo": extra}
            file.write_text(json.dumps({"message": message, "time_ns": noted, "status": status}))
        found[rank] = ProcessFailure(rank, 70 + rank, exit_code, str(file))
    return found


def test_the_stacks_of_an_earlier_run_in_the_same_folder_are_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "run_x" / "attempt_0" / "1" / "stacks"
    file.parent.mkdir(parents=True)
    file.write_text("Fatal Python error")
    killed = ProcessFailure(1, 71, -11, "")
    since = file.stat().st_mtime
    assert read(1, killed, str(tmp_path), since).stacks == "Fatal Python error"
    assert read(1, killed, str(tmp_path), since + 1.0).stacks == ""


# --- what to try ------------------------------------------------------------------------------------------------

QUIET = Memory(kills=3, peak=0, limit=8 * GIB)
SPARE = "try fewer DataLoader workers, fewer ranks on this machine, offload to nvme instead of cpu"
DEVICE = "out of device memory: try a smaller micro-batch"
# Exit code, exception, memory afterwards, beginning of the one line (None: no line).
ADVICE: dict[str, tuple[int, str, Memory, str | None]] = {
    "killed, and the kernel counted": (
        -9,
        "",
        Memory(4, 3 * GIB, 8 * GIB),
        "probably out of memory: the kernel ended a process for lack of memory, the largest rank used 3.0 GiB of"
        f" 8.0 GiB; {SPARE}",
    ),
    "an exception because a worker was killed": (
        1,
        "RuntimeError: DataLoader worker (pid 9) is killed by signal: Killed.",
        Memory(5, 0, 8 * GIB),
        "probably out of memory: the kernel ended 2 processes for lack of memory, the limit is 8.0 GiB; try",
    ),
    "killed, with ranks as large as what there is": (
        -9,
        "",
        replace(QUIET, peak=4 * GIB),
        f"perhaps out of memory: the largest rank used 4.0 GiB of 8.0 GiB, for 2 ranks; {SPARE}",
    ),
    "killed, with small ranks": (
        -9,
        "",
        replace(QUIET, peak=GIB),
        "no sign of a lack of memory: the largest rank used 1.0 GiB of 8.0 GiB",
    ),
    "an exception of the host's allocator": (
        1,
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.",
        QUIET,
        f"out of host memory (the limit is 8.0 GiB): {SPARE}",
    ),
    "NumPy's": (1, "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7 TiB", QUIET, "out of host memory"),
    "CUDA's": (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", QUIET, DEVICE),
    "an older CUDA's": (1, "RuntimeError: CUDA error: out of memory", QUIET, DEVICE),
    "cuBLAS's": (1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", QUIET, DEVICE),
    "another exception": (1, "ValueError: the loss is not a number", QUIET, None),
    "another signal": (-11, "", QUIET, None),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_on(case: str, tmp_path: Path) -> None:
    exit_code, exception, after, line = ADVICE[case]
    note = tmp_path / "error.json"
    if exception:
        message = {"message": exception, "extraInfo": {"py_callstack": "", "timestamp": "0"}}
        note.write_text(json.dumps({"message": message, "time_ns": 5, "status": 1}))
    first = read(1, ProcessFailure(1, os.getpid(), exit_code, str(note)), str(tmp_path), 0.0)
    lines = advice(first, QUIET, after, ranks=2)
    assert [each.startswith(line or "no line") for each in lines] == ([] if line is None else [True])
