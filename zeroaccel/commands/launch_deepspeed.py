"""Several machines through DeepSpeed's own launchers: the command, and what travels to the machines."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from zeroaccel.commands import launch_hosts
from zeroaccel.commands.job import DEFAULT_PORT, Job, Script
from zeroaccel.commands.launch_settings import FILTERS, Settings
from zeroaccel.config import environment
from zeroaccel.errors import ConfigError, EnvironmentProblem

# Launcher -> the program by which DeepSpeed recognizes it.
PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpich": "mpirun", "mvapich": "mpiname", "slurm": "sinfo"}
# They start all slots of the hostfile: DeepSpeed refuses to limit machines or ranks with them.
ALL_SLOTS = ("openmpi", "mpich", "mvapich")
# Ranks of these get our variables from the process that starts them; the others from DeepSpeed's environment file.
INHERITING = ("nossh", "slurm")
# DeepSpeed tells these ranks nothing of where to meet.
UNTOLD = ("openmpi", "mvapich", "slurm")

# What DeepSpeed 0.19.8 hands on by itself begins so; on other machines it would be readable in the list of processes.
_HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY")
# What DeepSpeed carries unchanged: it puts all else in quotes, which MPI takes for a part of the value.
_CARRIED = re.compile(r"[\w@%+=:,./-]+")

# Options of torch's launcher that DeepSpeed's have no like of.
_TORCHS = ("max_restarts", "monitor_interval", "tee", "log_dir", "role", "rdzv_backend", "rdzv_conf")


def plan(settings: Settings, launcher: str, script: Script, variables: dict[str, str]) -> DeepSpeedJob:
    """The job of one of DeepSpeed's launchers.

    Args:
        settings: the options.
        launcher: which of them.
        script: what the ranks run.
        variables: what the ranks get.

    Raises:
        ConfigError: hostfile, filters, numbers and options that do not fit together.
    """
    options = settings.options
    if options.deepspeed_hostfile is None:
        raise ConfigError(
            f"{settings.name('deepspeed_multinode_launcher')} {launcher} needs --deepspeed_hostfile, which names the"
            " machines; with `standard`, start `zeroaccel launch` on every machine"
        )
    include, exclude = options.deepspeed_inclusion_filter, options.deepspeed_exclusion_filter
    hosts = launch_hosts.filtered(launch_hosts.read_hostfile(options.deepspeed_hostfile), include, exclude)
    address = options.main_process_ip or next(iter(hosts))
    port = options.main_process_port if options.main_process_port is not None else DEFAULT_PORT
    if launcher in UNTOLD:
        variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if launcher == "slurm":
        variables |= environment.exports({"ranks_from": "slurm"})
    problems = [
        *_unfit_hosts(settings, launcher, hosts, port),
        *_unfit_options(settings, launcher, script),
        *check_carried(launcher, variables),
    ]
    if problems:
        raise ConfigError.join(problems)
    arguments = ["--hostfile", options.deepspeed_hostfile, "--no_local_rank"]
    arguments += (
        ["--no_ssh", "--node_rank", str(options.machine_rank)] if launcher == "nossh" else ["--launcher", launcher]
    )
    for flag, text in (("--include", include), ("--exclude", exclude)):
        arguments += [flag, text] if text else []
    per_host = (options.num_processes or 0) // len(hosts)
    if per_host and not (include or exclude) and any(len(slots) != per_host for slots in hosts.values()):
        arguments += ["--num_gpus", str(per_host)]
    if launcher != "pdsh":
        arguments += ["--no_ssh_check"]
    if launcher != "pdsh" or options.main_process_ip:  # pdsh's names may be ssh's own: DeepSpeed asks for the address
        arguments += ["--master_addr", address]
    arguments += ["--master_port", str(port), *(["--quiet"] if options.quiet else [])]
    return DeepSpeedJob(script=script, environment=variables, launcher=launcher, options=tuple(arguments))


def _unfit_hosts(settings: Settings, launcher: str, hosts: launch_hosts.Hosts, port: int) -> list[str]:
    """What hostfile, filters and numbers say against each other."""
    options = settings.options
    slots = [len(slots) for slots in hosts.values()]
    left = f"the hostfile with its filter leaves {len(hosts)} machine(s) with {sum(slots)} slots"
    problems = []
    if len(hosts) == 1:
        problems.append(f"{left}: for a single machine, leave the hostfile away and start there")
    if options.num_machines not in (None, len(hosts)):
        problems.append(f"{left}, but {settings.name('num_machines')} is {options.num_machines}: make them agree")
    if (total := options.num_processes) is not None:
        limited = launcher not in ALL_SLOTS and not any(getattr(options, name) for name in FILTERS)
        fits = total % len(hosts) == 0 and total // len(hosts) <= min(slots) if limited else total == sum(slots)
        if not fits:
            wanted = f"a multiple of {len(hosts)}, at most {min(slots) * len(hosts)}" if limited else str(sum(slots))
            problems.append(f"{left}, but {settings.name('num_processes')} is {total}: write {wanted}")
    if launcher in ALL_SLOTS and any(getattr(options, name) for name in FILTERS):
        problems.append(
            f"DeepSpeed's {launcher} launcher takes the whole hostfile: write a shorter one, without filter"
        )
    if launcher in ("mpich", "mvapich") and len(set(slots)) > 1:
        problems.append(f"{launcher} starts the same number of ranks on every machine, the hostfile has {slots}")
    if port == 0:
        problems.append(f"{settings.name('main_process_port')} 0: several machines cannot guess a free port, write one")
    if launcher == "nossh" and not 0 <= (-1 if options.machine_rank is None else options.machine_rank) < len(hosts):
        problems.append(f"nossh starts the ranks of this machine only: write --machine_rank, 0 to {len(hosts) - 1}")
    return problems


def _unfit_options(settings: Settings, launcher: str, script: Script) -> list[str]:
    """Options that DeepSpeed's launchers cannot serve."""
    unserved = [name for name in (*_TORCHS, "enable_cpu_affinity") if settings.typed(name)]
    problems = []
    if unserved:
        names = ", ".join(f"--{name}" for name in unserved)
        problems.append(f"DeepSpeed's {launcher} launcher has no {names}: leave it away, or use `standard`")
    if settings.options.gpu_ids not in (None, "all"):
        problems.append(
            f"{settings.name('gpu_ids')} is for one machine: use --deepspeed_inclusion_filter, name:0,2 for instance"
        )
    if launcher == "slurm" and script.kind != "file":
        problems.append("DeepSpeed's slurm launcher runs Python files only: leave -m and --no_python away")
    return problems


@dataclass(frozen=True)
class DeepSpeedJob(Job):
    """Ranks on several machines that one of DeepSpeed's launchers starts.

    Attributes:
        launcher: which of them.
        options: arguments of `deepspeed`.
    """

    launcher: str
    options: tuple[str, ...]

    def command(self) -> list[str]:
        """The exact command."""
        flag = {"file": [], "module": ["--module"], "program": ["--no_python"]}[self.script.kind]
        words = (
            [_for_remote_shell(word) for word in self.script.words] if self.launcher == "pdsh" else self.script.words
        )
        return [sys.executable, "-m", "deepspeed.launcher.runner", *self.options, *flag, *words]

    def describe(self) -> str:
        """The environment and the command as a shell would take them."""
        if self.launcher in INHERITING:
            return super().describe()
        file = ["cat > deepspeed_env <<'END'", *self._file_lines(), "END", "DS_ENV_FILE=$PWD/deepspeed_env \\"]
        return "\n".join([*file, shlex.join(self.command())])

    def run(self) -> int:
        """Runs DeepSpeed's launcher; returns its exit status.

        Raises:
            EnvironmentProblem: the program that it needs is not installed.
        """
        program = PROGRAMS.get(self.launcher)
        if program is not None and shutil.which(program) is None:
            raise EnvironmentProblem(
                f"--deepspeed_multinode_launcher {self.launcher} needs `{program}`, which is not on the PATH: install"
                " it, or write `standard` and start `zeroaccel launch` on every machine"
            )
        variables = dict(os.environ) if self.launcher == "nossh" else without_secrets(os.environ)
        if self.launcher in INHERITING:
            return _wait_for(self.command(), {**variables, **self.environment})
        with tempfile.NamedTemporaryFile("w", prefix="zeroaccel-env-", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in [*_own_file_lines(), *self._file_lines()])
            file.flush()
            return _wait_for(self.command(), {**variables, "DS_ENV_FILE": file.name})

    def _file_lines(self) -> list[str]:
        """What travels: our variables. DeepSpeed adds the PYTHONPATH itself."""
        return [f"{name}={value}" for name, value in sorted(self.environment.items()) if name != "PYTHONPATH"]


def check_carried(launcher: str, variables: Mapping[str, str]) -> list[str]:
    """A line for each value that DeepSpeed's environment file cannot carry as it is."""
    if launcher in INHERITING:
        return []
    return [
        f"{name}={value!r} cannot travel through DeepSpeed's {launcher} launcher, which carries letters, digits and"
        " @%+=:,./- only: use another path"
        for name, value in variables.items()
        if name != "PYTHONPATH" and not _CARRIED.fullmatch(value)
    ]


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables for DeepSpeed's launcher, without the secrets among those that it would hand on by itself."""
    withheld = [name for name in variables if name.startswith(_HANDED_ON) and _SECRET.search(name)]
    if withheld:
        print(
            f"zeroaccel launch: {', '.join(withheld)} would stand in the process lists of all machines, and stays here:"
            " set it there",
            file=sys.stderr,
        )
    return {name: value for name, value in variables.items() if name not in withheld}


def _own_file_lines() -> list[str]:
    """What the user has written for DeepSpeed to carry, where it looks by itself."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = []
    for path in (os.path.join(os.path.expanduser("~"), name), name):
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                lines += [line for line in file.read().splitlines() if "=" in line]
    return lines


def _for_remote_shell(word: str) -> str:
    """A word that the shell of another machine takes as it is; DeepSpeed puts those with spaces into double quotes."""
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _wait_for(command: list[str], variables: Mapping[str, str]) -> int:
    """Runs a program that shares our terminal: Ctrl-C reaches it as it reaches us, and a SIGTERM is handed on."""
    process = subprocess.Popen(command, env=dict(variables))
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status
