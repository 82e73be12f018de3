"""Whether the ranks ran out of host memory: what the kernel counted, what they used, what they may use."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30
_FULL = 0.9  # part of the limit above which a lack of memory is suspected


@dataclass(frozen=True)
class Memory:
    """Host memory at one moment, as this process and the programs that it starts see it.

    Attributes:
        kills: processes that the kernel has ended for lack of memory, in this control group, else on this machine.
        peak: bytes that the largest program that this process started had resident, of those that have ended.
        limit: bytes that all of them together may use.
    """

    kills: int
    peak: int
    limit: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> Memory:
        """What holds now; `root` holds the folders `proc` and `sys`."""
        group = _control_group(root)
        limits = [_field(root / "proc/meminfo", "MemTotal:") * 1024, *(_limits(group) if group else ())]
        kills = _field(root / "proc/vmstat", "oom_kill") if group is None else _kills(group)
        unit = 1 if sys.platform == "darwin" else 1024
        return cls(kills, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit, min(limits))


def usage(before: Memory, after: Memory) -> str:
    """What the ranks used between two moments, and what they may use."""
    limit = f"{after.limit / _GIB:.1f} GiB"
    if after.peak <= before.peak:  # something else that this process started was larger
        return f"the limit is {limit}"
    return f"the largest rank used {after.peak / _GIB:.1f} GiB of {limit}"


def is_full(before: Memory, after: Memory, ranks: int) -> bool:
    """Whether ranks as large as the largest one came close to the limit between two moments."""
    return after.peak > before.peak and after.peak * ranks > _FULL * after.limit


def _control_group(root: Path) -> Path | None:
    """The folder of the control group that limits this process's memory, of either version; None: no such."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            candidates, file = [mount / "memory" / path.lstrip("/"), mount / "memory"], "memory.oom_control"
        elif controllers == "":
            candidates, file = [mount / path.lstrip("/"), mount], "memory.events"
        else:
            continue
        # In a container the path can be the host's, and the group be mounted at the top.
        for folder in candidates:
            if (folder / file).exists():
                return folder
    return None


def _kills(group: Path) -> int:
    """Both versions name the counter `oom_kill`."""
    return max(_field(group / name, "oom_kill") for name in ("memory.events", "memory.oom_control"))


def _limits(group: Path) -> Iterator[int]:
    """Limits of the group and of those around it."""
    around = _field(group / "memory.stat", "hierarchical_memory_limit")  # version 1
    if around:
        yield around
    for folder in (group, *group.parents):
        for line in _lines(folder / "memory.max"):
            if line != "max":
                yield int(line)


def _field(file: Path, name: str) -> int:
    """The number behind a name in a file of names and numbers; 0 if it is not there."""
    for line in _lines(file):
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
