"""`fail.py HOW FOLDER`: rank 1 ends as `HOW` says, while rank 0 waits for it.

HOW is `exit`, `sleep` (both ranks, until a signal ends them), or `raise` and `kill`, where rank 0 waits inside a
collective, which fails once rank 1 is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def lose_the_run() -> None:
    """What the traceback shows."""
    raise ValueError("the loss is not a number")


def wait_in_a_collective() -> None:
    """Rank 0 enters a barrier that rank 1 never enters."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "0":
        torch.distributed.barrier()


def main(how: str, folder: str) -> None:
    """See above."""
    if how in ("raise", "kill"):
        wait_in_a_collective()
    file = Path(folder, f"pid{os.environ['RANK']}")
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
    if os.environ["RANK"] == "1":
        if how == "exit":
            sys.exit(3)
        elif how == "raise":
            lose_the_run()
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


if __name__ == "__main__":
    main(*sys.argv[1:])
