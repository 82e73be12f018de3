"""Which rank is named first when several failed: the launcher sees them at once, in any order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from zeroaccel.commands.launch_elastic import explain

# What happened: for each rank its exit code and when it noted an exception (None: never), then the lines told
# and the exit status.
Failures = dict[int, tuple[int, int | None]]
CASES: dict[str, tuple[Failures, list[str], int]] = {
    "the earlier exception": (
        {0: (1, 20), 1: (2, 10)},
        ["rank 1 of 4 failed first: Error 10 (exit status 2)", "rank 0 failed after it: Error 20 (exit status 1)"],
        2,
    ),
    "a kill, whatever the others had time to note": (
        {0: (1, 10), 1: (-9, None)},
        ["rank 1 of 4 failed first: killed by SIGKILL (pid 71)", "rank 0 failed after it: Error 10 (exit status 1)"],
        137,
    ),
    "an end without a word": (
        {0: (1, 10), 2: (5, None)},
        [
            "rank 2 of 4 failed first: it ended with exit status 5 and no exception",
            "rank 0 failed after it: Error 10 (exit status 1)",
        ],
        5,
    ),
    "an exception, not the abort that it leads to": (
        {0: (-6, None), 3: (1, 10)},
        ["rank 3 of 4 failed first: Error 10 (exit status 1)", "rank 0 failed after it: killed by SIGABRT (pid 70)"],
        1,
    ),
    "no rank that the launcher itself ended": (
        {0: (-15, None), 1: (2, 10), 2: (-15, None)},
        ["rank 1 of 4 failed first: Error 10 (exit status 2)"],
        2,
    ),
    "a rank that raised, even if the launcher ended it while it was leaving": (
        {0: (1, 20), 1: (-15, 10)},
        ["rank 1 of 4 failed first: Error 10 (exit status 1)", "rank 0 failed after it: Error 20 (exit status 1)"],
        1,
    ),
    "a rank ended from outside, if there is no other": (
        {1: (-15, None)},
        ["rank 1 of 4 failed first: killed by SIGTERM (pid 71)"],
        143,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named_first_is(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures, lines, status = CASES[case]
    assert explain(_error(failures, tmp_path), num_processes=4) == status
    assert capsys.readouterr().err.splitlines() == [f"zeroaccel launch: {line}" for line in lines]


def _error(failures: Failures, folder: Path) -> ChildFailedError:
    """What torch's launcher raises, from the files that ranks write."""
    found = {}
    for rank, (exit_code, noted) in failures.items():
        file = folder / f"rank{rank}.json"
        if noted is not None:
            extra = {"py_callstack": "", "timestamp": "0"}
            status = max(exit_code, 1)
            message = {"message": f"Error {noted}", "extraInfo": extra}
            file.write_text(json.dumps({"message": message, "time_ns": noted, "status": status}))
        found[rank] = ProcessFailure(rank, 70 + rank, exit_code, str(file))
    return ChildFailedError("train.py", found)
