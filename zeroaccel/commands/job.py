"""What `zeroaccel launch` starts, as the options and this machine decide it."""

from __future__ import annotations

import shlex
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

DEFAULT_PORT = 29500  # where several machines meet, as with every launcher

ScriptKind = Literal["file", "module", "program"]


@dataclass(frozen=True)
class Script:
    """What every rank runs.

    Attributes:
        name: path of the file, name of the module, or program.
        arguments: what follows it on the command line.
        kind: which of the three `name` is.
    """

    name: str
    arguments: tuple[str, ...] = ()
    kind: ScriptKind = "file"

    @property
    def words(self) -> list[str]:
        """Name and arguments, as launchers of others take them."""
        return [self.name, *self.arguments]

    def command(self) -> list[str]:
        """The command that runs it in a process of its own."""
        python = {"file": [sys.executable, "-u"], "module": [sys.executable, "-u", "-m"], "program": []}
        return [*python[self.kind], *self.words]


@dataclass(frozen=True)
class Job(ABC):
    """Ranks to start.

    Attributes:
        script: what they run.
        environment: variables that every rank gets beside those that it has anyway.
    """

    script: Script
    environment: dict[str, str]

    @abstractmethod
    def command(self) -> list[str]:
        """The exact command."""

    @abstractmethod
    def run(self) -> int:
        """Starts the ranks and waits for them; returns the exit status."""

    def describe(self) -> str:
        """The environment and the command as a shell would take them, one variable a line."""
        variables = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(self.environment.items())]
        return "\n".join([*variables, shlex.join(self.command())])


@dataclass(frozen=True)
class Meeting:
    """Where machines and ranks find each other.

    Attributes:
        address: of machine 0.
        port: of machine 0; None: a free one, chosen when the ranks start; on one machine only.
        nodes: machines.
        node: which of them this is; None where the rendezvous decides it.
        backend: "static" or "c10d".
    """

    address: str = "127.0.0.1"
    port: int | None = None
    nodes: int = 1
    node: int | None = 0
    backend: str = "static"

    def torchrun_arguments(self) -> list[str]:
        """What `torchrun` has to know of it."""
        if self.nodes == 1:
            if self.port is None:
                return ["--nnodes=1", "--standalone", f"--local_addr={self.address}"]
            return ["--nnodes=1", f"--master_addr={self.address}", f"--master_port={self.port}"]
        if self.backend == "static":
            where = [f"--master_addr={self.address}", f"--master_port={self.port}"]
            return [f"--nnodes={self.nodes}", f"--node_rank={self.node}", *where]
        where = ["--rdzv_backend=c10d", f"--rdzv_endpoint={self.address}:{self.port}"]
        # The ranks meet on the machine that comes out first, under the name that it gives itself.
        own_name = [f"--local_addr={self.address}"] if self.node == 0 else []
        return [f"--nnodes={self.nodes}", *where, *own_name]


@dataclass(frozen=True)
class ElasticJob(Job):
    """Ranks that torch's elastic launcher starts on this machine.

    Attributes:
        num_processes: ranks on this machine.
        meeting: where they find each other, and the ranks of other machines.
        options: further arguments of `torchrun`.
        log_dir: folder for the ranks' logs and error files; None: a temporary one.
        keep_logs: whether a temporary one stays.
    """

    num_processes: int
    meeting: Meeting = Meeting()
    options: tuple[str, ...] = ()
    log_dir: str | None = None
    keep_logs: bool = False

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.num_processes * self.meeting.nodes

    def command(self) -> list[str]:
        """The exact command, but for a temporary folder for logs."""
        return ["torchrun", *self.torchrun_arguments(self.log_dir)]

    def torchrun_arguments(self, log_dir: str | None = None) -> list[str]:
        """Arguments for `torchrun`.

        Args:
            log_dir: folder for the ranks' logs and error files; None: torch's own choice.
        """
        arguments = [*self.meeting.torchrun_arguments(), f"--nproc_per_node={self.num_processes}", *self.options]
        if log_dir is not None:
            arguments.append(f"--log_dir={log_dir}")
        flag = {"file": [], "module": ["-m"], "program": ["--no_python"]}[self.script.kind]
        return [*arguments, "-m", "zeroaccel.commands.launch_rank", *flag, *self.script.words]

    def run(self) -> int:
        """Starts the ranks and waits for them; returns the exit status of the one that failed first, or 0."""
        from zeroaccel.commands import launch_elastic

        return launch_elastic.run(self)
