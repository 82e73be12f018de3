"""`fail.py HOW FOLDER`: the ranks end as `HOW` says (see `main`). Each writes the process ids of itself and of a child.

The child is a DataLoader's worker where rank 0 waits in a collective, which fails once rank 1 is gone; else a program
that ignores SIGTERM and SIGINT, where there is time for one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = os.environ["RANK"]


def lose_the_run() -> None:
    """What the traceback shows."""
    raise ValueError("the loss is not a number")


def start_child(how: str) -> int:
    """The process id of a child that has started."""
    if how in ("exit", "raise alike", "exit with a message"):
        return os.getpid()
    if how in ("raise", "kill"):
        import torch.distributed
        from torch.utils.data import DataLoader

        torch.distributed.init_process_group("gloo")
        start_child.loader = iter(DataLoader(range(9), num_workers=1))  # type: ignore[attr-defined,arg-type]
        return multiprocessing.active_children()[0].pid or 0
    stubborn = "trap '' TERM INT; echo ready; sleep 120"
    child = subprocess.Popen(["sh", "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def main(how: str, folder: str) -> None:
    """Ends the ranks.

    Args:
        how: `exit` (rank 1, status 3); `exit with a message` and `raise alike` (both ranks the same); `sleep` (both
            ranks, until a signal ends them) and `ignore signals` (the same, but SIGTERM and SIGINT do not); `raise`
            and `kill` (rank 1, while rank 0 waits in a barrier); `vanish` and `crash` (rank 1, while rank 0 takes no
            notice).
        folder: for the process ids, as `pids<rank>`.
    """
    child = start_child(how)
    if how == "ignore signals":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = Path(folder, f"pids{RANK}")
    file.with_suffix(".part").write_text(f"{os.getpid()} {child}")
    file.with_suffix(".part").rename(file)
    if how == "raise alike":
        lose_the_run()
    if how == "exit with a message":
        sys.exit("there is no data")
    if RANK == "1" and how != "sleep" and how != "ignore signals":
        while not Path(folder, "pids0").exists():
            time.sleep(0.01)
        end(how)
    if "torch" in sys.modules:
        sys.modules["torch"].distributed.barrier()
    time.sleep(120)


def end(how: str) -> None:
    """Ends this rank."""
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        lose_the_run()
    if how == "vanish":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)


if __name__ == "__main__":
    main(*sys.argv[1:])
