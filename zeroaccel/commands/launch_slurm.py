"""Inside `srun`: SLURM knows machines, ranks and addresses.

With one task a machine each task is a launcher, which starts the ranks of its machine. Where SLURM has started more
tasks, one for each rank, the launcher becomes the rank.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zeroaccel.commands.job import Job, Script
from zeroaccel.config import environment
from zeroaccel.errors import ConfigError

if TYPE_CHECKING:
    from zeroaccel.commands.launch_settings import Settings

# Options that only a launcher which starts the ranks can serve.
_STARTERS = (
    "max_restarts",
    "monitor_interval",
    "tee",
    "log_dir",
    "role",
    "rdzv_backend",
    "rdzv_conf",
    "enable_cpu_affinity",
)

# Below the ports that systems hand out by themselves (32768 and up on Linux).
_FIRST_PORT, _PORTS = 15000, 16000


@dataclass(frozen=True)
class Step:
    """A job step of more than one task, seen from one of them.

    Attributes:
        nodes, node: machines, and which of them this is.
        tasks, task: tasks on all machines, and which of them this is.
        local_tasks, local_task: the same on this machine.
        address: name of machine 0.
        port: for the ranks to meet on; each step of the cluster has another one, nearly always.
    """

    nodes: int
    node: int
    tasks: int
    task: int
    local_tasks: int
    local_task: int
    address: str
    port: int

    @property
    def task_is_rank(self) -> bool:
        """Whether SLURM has started the ranks, and not one launcher a machine."""
        return self.tasks != self.nodes


def step() -> Step | None:
    """The job step that this process is a task of; None outside `srun`, or if it is the only task."""
    if "SLURM_STEP_NODELIST" not in os.environ or _number("SLURM_STEP_NUM_TASKS") == 1:
        return None
    node = _number("SLURM_NODEID")
    return Step(
        nodes=_number("SLURM_STEP_NUM_NODES"),
        node=node,
        tasks=_number("SLURM_STEP_NUM_TASKS"),
        task=_number("SLURM_PROCID"),
        local_tasks=expand_counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])[node],
        local_task=_number("SLURM_LOCALID"),
        address=first_host(os.environ["SLURM_STEP_NODELIST"]),
        port=_FIRST_PORT + (_number("SLURM_JOB_ID") * 31 + _number("SLURM_STEP_ID")) % _PORTS,
    )


def _number(name: str) -> int:
    return environment.parse_whole(os.environ.get(name, ""), name, lowest=0)


def expand_counts(text: str) -> list[int]:
    """Tasks of each machine, from SLURM's way to write them: `2(x3),1` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def first_host(text: str) -> str:
    """The first name of a list of hosts as SLURM writes it: of `gpu[03-05,7],big1` it is gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", text)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


@dataclass(frozen=True)
class TaskJob(Job):
    """This process, which SLURM started, becomes one of the ranks."""

    def command(self) -> list[str]:
        """The exact command."""
        return self.script.command()

    def run(self) -> int:
        """Does not return: the script takes this process's place."""
        sys.stdout.flush()
        command = self.command()
        os.execvpe(command[0], command, {**os.environ, **self.environment})


def rank_variables(step: Step) -> dict[str, str]:
    """What a rank has to know of the others."""
    one_gpu_each = re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "RANK": str(step.task),
        "WORLD_SIZE": str(step.tasks),
        # Where SLURM shows each task its own GPU only, that is GPU 0 for all of them.
        "LOCAL_RANK": "0" if one_gpu_each else str(step.local_task),
        "LOCAL_WORLD_SIZE": str(step.local_tasks),
        "MASTER_ADDR": step.address,
        "MASTER_PORT": str(step.port),
    }


def plan(settings: Settings, step: Step, script: Script, variables: dict[str, str]) -> TaskJob:
    """The job of a launcher that SLURM started once for each rank.

    Args:
        settings: the options.
        step: the job step.
        script: what the ranks run.
        variables: what the ranks get.

    Raises:
        ConfigError: options that speak against SLURM's ranks, or need a launcher that starts them.
    """
    options = settings.options
    problems = []
    if options.num_processes != step.tasks:
        problems.append(
            f"{settings.name('num_processes')} is {options.num_processes}, but srun has started {step.tasks} tasks,"
            " each of which becomes a rank: leave it away, or start one task a machine (srun --ntasks-per-node=1)"
        )
    if unserved := [name for name in _STARTERS if settings.typed(name)]:
        names = ", ".join(f"--{name}" for name in unserved)
        problems.append(
            f"{names}: srun has started the ranks, so that there is no launcher to do it: leave it away, or start one"
            " task a machine (srun --ntasks-per-node=1)"
        )
    if problems:
        raise ConfigError.join(problems)
    told = rank_variables(step) | {
        "MASTER_PORT": str(options.main_process_port),
        "MASTER_ADDR": options.main_process_ip,
    }
    return TaskJob(script=script, environment={**variables, **told})
