"""The evidence for a lack of host memory: control groups of both versions in a made folder, and one for real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.runs import ZEROACCEL_LAUNCH, run
from zeroaccel.commands.launch_memory import Memory

TOTAL = 16 * 2**30
UNLIMITED = 9223372036854771712

# Files of a machine, then kills and limit. All machines have 16 GiB and 7 kills in all.
MACHINES: dict[str, tuple[dict[str, str], int, int]] = {
    "no control groups": ({}, 7, TOTAL),
    "version 2": (
        {
            "proc/self/cgroup": "0::/job",
            "sys/fs/cgroup/job/memory.events": "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0",
            "sys/fs/cgroup/job/memory.max": "4096",
        },
        3,
        4096,
    ),
    "version 2, limited further up": (
        {
            "proc/self/cgroup": "0::/pod/job",
            "sys/fs/cgroup/pod/job/memory.events": "oom_kill 1",
            "sys/fs/cgroup/pod/job/memory.max": "max",
            "sys/fs/cgroup/pod/memory.max": "8192",
        },
        1,
        8192,
    ),
    "version 2 in a container that sees the host's path": (
        {
            "proc/self/cgroup": "0::/../../system.slice/docker-1.scope",
            "sys/fs/cgroup/memory.events": "oom_kill 2",
            "sys/fs/cgroup/memory.max": "max",
        },
        2,
        TOTAL,
    ),
    "version 2, at its root, which counts nothing": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cgroup.procs": "1"},
        7,
        TOTAL,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/job",
            "sys/fs/cgroup/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5",
            "sys/fs/cgroup/memory/job/memory.stat": "cache 1\nhierarchical_memory_limit 12288\ntotal_rss 4",
        },
        5,
        12288,
    ),
    "version 1 without a limit, in a container": (
        {
            "proc/self/cgroup": "4:memory:/docker/1",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 6",
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {UNLIMITED}",
        },
        6,
        TOTAL,
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_memory_is_read_on_a_machine_with(machine: str, tmp_path: Path) -> None:
    files, kills, limit = MACHINES[machine]
    everywhere = {
        "proc/meminfo": f"MemTotal: {TOTAL // 1024} kB\nMemFree: 1 kB",
        "proc/vmstat": "pgmajfault 1\noom_kill 7",
    }
    for name, text in {**everywhere, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    memory = Memory.read(tmp_path)
    assert (memory.kills, memory.limit) == (kills, limit)


def test_memory_of_this_machine_is_read() -> None:
    memory = Memory.read()
    assert memory.kills >= 0
    assert 2**28 < memory.limit < 2**60


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A new control group of 600 MiB, where this user may make one."""
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    folder = Path("/sys/fs/cgroup", "" if version_2 else "memory", f"zeroaccel-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(600 * 2**20))
    except OSError as error:
        folder.rmdir() if folder.exists() else None
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_rank_that_the_kernel_ends_for_lack_of_memory_is_told_as_such(control_group: Path, tmp_path: Path) -> None:
    script = tmp_path / "grow.py"
    script.write_text("import os\nhoard = [os.urandom(2**24) for _ in range(64 if os.environ['RANK'] == '1' else 1)]\n")
    enter = ("sh", "-c", f'echo $$ > {control_group}/cgroup.procs; exec "$@"', "sh")
    result = run((*enter, *ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2", str(script)), tmp_path)
    assert result.status == 128 + 9
    first, advice = result.err.splitlines()
    assert "zeroaccel launch: rank 1 of 2 failed first on " in first
    assert "killed by SIGKILL (pid " in first
    assert advice.startswith(
        "zeroaccel launch: probably out of memory: the kernel ended a process for lack of memory, the"
    )
    assert " GiB of 0.6 GiB; try " in advice
