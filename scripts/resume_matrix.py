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
from tests.checkpoint.test_resume import EVERYWHERE, FROM, Pools  # noqa: E402
from tests.distributed.pool import RankPool  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
MARK = "<!-- scripts/resume_matrix.py writes what follows -->"


def main() -> None:
    """Fills the table."""
    two = RankPool(2)
    pools = Pools(two)
    rows = [f"| resumed as | {' | '.join(map(str, FROM))} |", "|---|" + "---|" * len(FROM)]
    cells: dict[str, list[str]] = {str(run): [] for run in EVERYWHERE}
    try:
        for saved in FROM:
            with tempfile.TemporaryDirectory() as folder:
                shown = pools[saved.ranks].run(resume.save_and_go_on, run=saved, folder=folder)[0]
                for run in EVERYWHERE:
                    again = pools[run.ranks].run(resume.resume, run=run, folder=folder)[0]
                    cells[str(run)].append(f"{resume.difference(shown, again):.0e}")
            print(saved, flush=True)
    finally:
        pools.close()
        two.close()
    rows += [f"| {name} | {' | '.join(found)} |" for name, found in cells.items()]
    text = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{text}{MARK}\n" + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
