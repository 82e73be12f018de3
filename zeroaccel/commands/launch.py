"""`zeroaccel launch`: what was typed becomes a job, and the job runs through torch's elastic launcher."""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import sys
from collections.abc import Sequence

from zeroaccel.commands.arguments import OneLineParser, add_option, boolean, number
from zeroaccel.commands.job import Job
from zeroaccel.config import environment
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.types import DynamoBackend, PrecisionType
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


def make_parser() -> OneLineParser:
    """The parser of `zeroaccel launch`. Every option that was not typed is None."""
    parser = OneLineParser(
        prog="zeroaccel launch",
        usage="zeroaccel launch [options] SCRIPT [script arguments]",
        description="Start SCRIPT on every device of this machine. Options work with dashes, too.",
    )
    _add_hardware_options(parser)
    _add_meeting_options(parser)
    _add_training_options(parser)
    _add_deepspeed_options(parser)
    parser.add_argument("script", metavar="SCRIPT", help="Python file, or with -m the name of a module")
    rest = parser.add_argument("script_arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # Python 3.11 names it beside SCRIPT where only SCRIPT is missing
    return parser


def _add_hardware_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("processes and devices")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--cpu", "--use_cpu", action="store_true", help="stay on the CPU even if there are GPUs")
    add("--multi_gpu", action="store_true", help="insist on GPUs: never fall back to the CPU")
    add("--gpu_ids", metavar="IDS", help="GPUs to use, as in CUDA_VISIBLE_DEVICES: 0,1 (default: all)")
    add("--num_processes", type=number(int, 1), metavar="N", help="ranks (default: one a GPU; 1 on a CPU)")
    add(
        "--num_cpu_threads_per_process",
        type=number(int, 1),
        metavar="N",
        help="OMP_NUM_THREADS of each rank (default: the cores divided by the ranks)",
    )
    add("-m", "--module", action="store_true", dest="module", help="SCRIPT is a module, as in `python -m`")
    add("--debug", action="store_true", help="sets `PartialState().debug` in the script")
    add("--dry_run", action="store_true", help="print the environment and the command, start nothing")
    add("-q", "--quiet", action="store_true", dest="quiet", help="nothing to silence: a failure is told once anyway")


def _add_meeting_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("where the ranks meet")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--num_machines", type=number(int, 1), metavar="N", help="machines; only 1 so far")
    add("--machine_rank", type=number(int, 0), metavar="N", help="which of the machines this is, from 0")
    add("--main_process_ip", metavar="ADDRESS", help="address of rank 0 (default: 127.0.0.1)")
    add(
        "--main_process_port",
        type=number(int, 0, 65535),
        metavar="PORT",
        help="port that the ranks meet on; if it is taken, a free one (default: a free one)",
    )
    add("--rdzv_backend", choices=("static", "c10d"), help="the same on one machine: the launcher is the meeting place")
    add("--same_network", action="store_true", help="always so on one machine")


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
    add(
        "--dynamo_backend",
        type=str.upper,
        choices=DynamoBackend.list(),
        metavar="NAME",
        help="compile models with this backend of torch.compile (default: no)",
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
    """Refuses what cannot start, whatever the machine.

    Raises:
        ConfigError: a missing script, module or DeepSpeed config, options that contradict each other, or something
            that this version cannot do.
    """
    if (options.num_machines or 1) > 1 or (options.machine_rank or 0) > 0:
        raise ConfigError("several machines are not supported yet: leave --num_machines and --machine_rank away")
    if options.cpu and (options.multi_gpu or _gpu_ids(options)):
        raise ConfigError("--cpu leaves the GPUs alone, --multi_gpu and --gpu_ids ask for some: leave one side away")
    _check_script(options.script, bool(options.module))
    if options.deepspeed_config_file is not None:
        try:
            HfDeepSpeedConfig(options.deepspeed_config_file)
        except ConfigError as error:
            raise ConfigError(f"--deepspeed_config_file: {error}") from None


def _check_script(script: str, module: bool) -> None:
    if module:
        top = script.partition(".")[0]
        if importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is None:
            raise ConfigError(f"there is no module {script!r}: is it installed, or in this folder?")
    elif os.path.isdir(script) and not os.path.exists(os.path.join(script, "__main__.py")):
        raise ConfigError(f"{script!r} is a folder without a __main__.py: name the script in it")
    elif not os.path.exists(script):
        raise ConfigError(f"there is no script {script!r} (seen from {os.getcwd()})")


def _gpu_ids(options: argparse.Namespace) -> str | None:
    """The GPUs that were named, None for all."""
    return None if options.gpu_ids in (None, "all") else str(options.gpu_ids)


def plan(options: argparse.Namespace, devices: int) -> Job:
    """The job that the options describe.

    Args:
        options: what `parse` read.
        devices: GPUs that the ranks will see; 0 to stay on the CPU.

    Raises:
        ConfigError: more ranks than GPUs, or none where they were asked for.
    """
    gpu_ids = _gpu_ids(options)
    if devices == 0 and (options.multi_gpu or gpu_ids):
        asked = f"--gpu_ids {gpu_ids}" if gpu_ids else "--multi_gpu"
        raise ConfigError(f"{asked}, but no GPU is visible: leave it away to train on the CPU")
    named = len(gpu_ids.split(",")) if gpu_ids else devices
    num_processes = options.num_processes or max(named, 1)
    if 0 < devices < num_processes:
        raise ConfigError(
            f"{num_processes} ranks, but {devices} GPU(s) are visible: ask for --num_processes {devices}, or add --cpu"
        )
    variables = environment.exports(typed_fields(options))
    if options.num_cpu_threads_per_process or "OMP_NUM_THREADS" not in os.environ:
        threads = options.num_cpu_threads_per_process or max(1, _cores() // num_processes)
        variables["OMP_NUM_THREADS"] = str(threads)
    if gpu_ids:
        variables["CUDA_VISIBLE_DEVICES"] = gpu_ids
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


def _count_devices(options: argparse.Namespace) -> int:
    if options.cpu:
        return 0
    if gpu_ids := _gpu_ids(options):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_ids  # before torch counts
    from zeroaccel.commands import launch_elastic

    return launch_elastic.device_count()


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel launch`; returns the exit status of the rank that failed first, or 0."""
    options = parse(argv)
    check(options)
    job = plan(options, _count_devices(options))
    if options.dry_run:
        print(job.describe())
        return 0
    from zeroaccel.commands import launch_elastic

    return launch_elastic.run(job)
