"""Saves on every kind of run, resumes on every other, and writes the largest differences into docs/checkpoints.md.

    python scripts/resume_matrix.py

Takes some minutes. The differences are those of the losses and learning rates of four further steps to the run that was
not interrupted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpoint import resume  # noqa: E402
from tests.checkpoint.resume import Run  # noqa: E402
from tests.checkpoint.test_resume import EVERYWHERE, FROM, Pools  # noqa: E402
from tests.distributed.pool import RankPool  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
MARK = "<!-- scripts/resume_matrix.py writes what follows -->"


def column(pools: Pools, saved: Run) -> list[float]:
    """Largest differences of every run that goes on where `saved` was saved."""
    with tempfile.TemporaryDirectory() as folder:
        shown = pools[saved.ranks].run(resume.save_and_go_on, run=saved, folder=folder)[0]
        return [
            resume.difference(shown, pools[run.ranks].run(resume.resume, run=run, folder=folder)[0])
            for run in EVERYWHERE
        ]


def write(columns: list[list[float]]) -> None:
    """Puts the table into the page."""
    rows = [f"| resumed as | {' | '.join(map(str, FROM))} |", "|---|" + "---|" * len(FROM)]
    for run, found in zip(EVERYWHERE, zip(*columns, strict=True), strict=True):
        rows.append(f"| {run} | {' | '.join(f'{one:.0e}' for one in found)} |")
    text = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{text}{MARK}\n" + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Fills the table."""
    two = RankPool(2)
    pools, columns = Pools(two), []
    try:
        for saved in FROM:
            columns.append(column(pools, saved))
            print(saved, flush=True)
    finally:
        pools.close()
        two.close()
    write(columns)


if __name__ == "__main__":
    main()
