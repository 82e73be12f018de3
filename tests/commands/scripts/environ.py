"""`environ.py FOLDER ...`: each rank writes its arguments, variables and cores, without torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Writes `rank<N>.json`, N from whoever numbers the ranks."""
    report = {"arguments": sys.argv[2:], "variables": dict(os.environ), "folder": os.getcwd()}
    report["cores"] = sorted(os.sched_getaffinity(0))
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
    print(f"rank {os.environ['RANK']}")


if __name__ == "__main__":
    main()
