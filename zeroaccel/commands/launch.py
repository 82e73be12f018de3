"""`zeroaccel launch`: what was typed becomes a job, and the job runs through torch's elastic launcher."""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from zeroaccel.commands.arguments import OneLineParser, add_option, boolean, number
from zeroaccel.config import environment
from zeroaccel.config.types import PrecisionType
from zeroaccel.errors import ConfigError

DEVICES = ("none", "cpu", "nvme")

# Typing one of these without --use_deepspeed turns DeepSpeed on: they mean nothing without it.
DEEPSPEED_ONLY = (
    "zero_stage",
    "gradient_clipping",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_config_file",
    "auto_policy",
)


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


def make_parser() -> OneLineParser:
    """The parser of `zeroaccel launch`. Every option that was not typed is None."""
    parser = OneLineParser(
        prog="zeroaccel launch",
        usage="zeroaccel launch [options] SCRIPT [script arguments]",
        description="Start SCRIPT on every device of this machine. Options work with dashes, too.",
    )
    _add_hardware_options(parser)
    _add_training_options(parser)
    _add_deepspeed_options(parser)
    parser.add_argument("script", metavar="SCRIPT", help="Python file, or with -m the name of a module")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _add_hardware_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("processes and devices")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--cpu", "--use_cpu", action="store_true", help="stay on the CPU even if there are GPUs")
    add("--num_processes", type=number(int, 1), metavar="N", help="ranks (default: one a GPU; 1 on a CPU)")
    add("--num_machines", type=number(int, 1), metavar="N", help="machines; only 1 so far")
    add("--machine_rank", type=number(int, 0), metavar="N", help="which of the machines this is, from 0")
    add("--main_process_ip", metavar="ADDRESS", help="where the ranks meet (default: 127.0.0.1)")
    add(
        "--main_process_port",
        type=number(int, 0, 65535),
        metavar="PORT",
        help="port that the ranks meet on; if it is taken, a free one (default: a free one)",
    )
    add("-m", "--module", action="store_true", dest="module", help="SCRIPT is a module, as in `python -m`")
    add("--dry_run", action="store_true", help="print the environment and the command, start nothing")


def _add_training_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("training")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add(
        "--mixed_precision",
        type=str.lower,
        choices=PrecisionType.list(),
        help="number format of the forward pass",
    )
    add(
        "--gradient_accumulation_steps",
        type=number(int, 1),
        metavar="N",
        help="micro-batches an optimizer step",
    )


def _add_deepspeed_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("DeepSpeed", "Each of these turns DeepSpeed on.")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add(
        "--use_deepspeed",
        action="store_true",
        help="train through DeepSpeed (ZeRO stage 2 unless told otherwise)",
    )
    add(
        "--zero_stage",
        type=number(int, 0, 3),
        metavar="0-3",
        help="1 splits optimizer states, 2 gradients, 3 weights",
    )
    add("--gradient_clipping", type=number(float, 0.0), metavar="NORM", help="largest gradient norm; 0 is off")
    add("--offload_optimizer_device", type=str.lower, choices=DEVICES, help="where optimizer states live")
    add("--offload_param_device", type=str.lower, choices=DEVICES, help="where stage 3 keeps parameters")
    add("--offload_optimizer_nvme_path", metavar="FOLDER", help="for optimizer states on NVMe")
    add("--offload_param_nvme_path", metavar="FOLDER", help="for parameters on NVMe")
    add("--zero3_init_flag", type=boolean, metavar="true|false", help="build models already split (stage 3)")
    add(
        "--zero3_save_16bit_model",
        type=boolean,
        metavar="true|false",
        help="gather 16-bit weights on saving (stage 3)",
    )
    add("--deepspeed_config_file", metavar="FILE", help="DeepSpeed JSON configuration")
    add(
        "--auto_policy",
        choices=("fast", "accelerate"),
        help="numbers for `auto` buckets: ours, or Accelerate's",
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; ends the program with one line and status 2 where it makes no sense."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    parser.refuse_unknown(unknown)
    return options


def typed_fields(options: argparse.Namespace) -> dict[str, object]:
    """The typed ones of `environment.FIELDS`, and `use_deepspeed` where one of them implies it."""
    given = vars(options)
    fields = {name: given[name] for name in environment.FIELDS if given.get(name) is not None}
    if any(name in fields for name in DEEPSPEED_ONLY):
        fields["use_deepspeed"] = True
    return fields


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot start.

    Raises:
        ConfigError: a missing script, module or file, or more machines than this version can drive.
    """
    if (options.num_machines or 1) > 1 or (options.machine_rank or 0) > 0:
        raise ConfigError("several machines are not supported yet: leave --num_machines and --machine_rank away")
    if options.module:
        top = options.script.partition(".")[0]
        if importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is None:
            raise ConfigError(f"there is no module {options.script!r}: is it installed, or in this folder?")
    elif os.path.isdir(options.script) and not os.path.exists(os.path.join(options.script, "__main__.py")):
        raise ConfigError(f"{options.script!r} is a folder without a __main__.py: name the script in it")
    elif not os.path.exists(options.script):
        raise ConfigError(f"there is no script {options.script!r} (seen from {os.getcwd()})")
    config_file = options.deepspeed_config_file
    if config_file is not None and not os.path.isfile(config_file):
        raise ConfigError(f"--deepspeed_config_file: there is no file {config_file!r}")


def plan(options: argparse.Namespace) -> Job:
    """The job that the options describe.

    Raises:
        ConfigError: see `check`; or more ranks than GPUs.
    """
    check(options)
    num_processes = options.num_processes or 1
    if not options.cpu:
        from zeroaccel.commands.launch_elastic import device_count

        devices = device_count()
        num_processes = options.num_processes or max(devices, 1)
        if 0 < devices < num_processes:
            raise ConfigError(
                f"--num_processes {num_processes}, but {devices} GPU(s) are visible:"
                f" ask for at most {devices}, or add --cpu"
            )
    variables = environment.exports(typed_fields(options))
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, _cores() // num_processes))
    return Job(
        script=options.script,
        script_arguments=tuple(options.script_arguments),
        module=bool(options.module),
        num_processes=num_processes,
        address=options.main_process_ip or "127.0.0.1",
        port=options.main_process_port or None,
        environment=variables,
    )


def _cores() -> int:
    """Cores that this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel launch`; returns the exit status of the rank that failed first, or 0."""
    options = parse(argv)
    job = plan(options)
    if options.dry_run:
        print(job.describe())
        return 0
    from zeroaccel.commands import launch_elastic

    return launch_elastic.run(job)
