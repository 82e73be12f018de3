"""What `zeroaccel launch` starts, as the options and this machine decide it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """Everything that the launcher needs.

    Attributes:
        script: path of the script, or name of the module.
        script_arguments: what follows it on the command line.
        module: whether `script` is a module's name.
        num_processes: ranks to start on this machine.
        address: where the ranks meet.
        port: port that the ranks meet on; None: a free one, chosen when they start.
        environment: variables that every rank gets on top of the launcher's own.
    """

    script: str
    script_arguments: tuple[str, ...]
    module: bool
    num_processes: int
    address: str
    port: int | None
    environment: dict[str, str]

    def torchrun_arguments(self, log_dir: str | None = None) -> list[str]:
        """Arguments for `torchrun`.

        Args:
            log_dir: folder for the ranks' error files.
        """
        arguments = ["--nnodes=1", f"--nproc_per_node={self.num_processes}", "--max_restarts=0"]
        if self.port is None:
            arguments += ["--standalone", f"--local_addr={self.address}"]
        else:
            arguments += [f"--master_addr={self.address}", f"--master_port={self.port}"]
        if log_dir is not None:
            arguments.append(f"--log_dir={log_dir}")
        rank_command = ["-m", "zeroaccel.commands.launch_rank", *(["-m"] if self.module else []), self.script]
        return arguments + rank_command + list(self.script_arguments)

    def describe(self) -> str:
        """The environment and the command as a shell would take them, one variable a line."""
        variables = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(self.environment.items())]
        return "\n".join([*variables, shlex.join(["torchrun", *self.torchrun_arguments()])])
