"""`zeroaccel launch`: what was typed, a launch configuration and SLURM become a job, and the job runs."""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zeroaccel.commands import launch_slurm
from zeroaccel.commands.job import DEFAULT_PORT, ElasticJob, Job, Meeting, Script, ScriptKind
from zeroaccel.commands.launch_options import DEEPSPEED_ONLY, RENDEZVOUS, launch_command_parser, parse
from zeroaccel.commands.launch_settings import Settings, configuration, deepspeed_launcher, settle, tell
from zeroaccel.config import environment
from zeroaccel.config.precedence import FIELD_KEYS
from zeroaccel.errors import ConfigError

if TYPE_CHECKING:
    from zeroaccel.commands.config.config_args import ClusterConfig

__all__ = ["check", "fields", "launch_command", "launch_command_parser", "plan", "run"]


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel launch`; returns the exit status of the rank that failed first, or 0."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # A KeyboardInterrupt inside torch's imports gets lost in an `except` of theirs; there is nothing to end yet.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    gc.disable()  # passes over all that PyTorch's import makes, and that stays, would take 0.15 s
    try:
        return _launch(parse(argv))
    finally:
        gc.enable()


def launch_command(args: argparse.Namespace) -> None:
    """Runs what `launch_command_parser()` has read.

    Raises:
        ConfigError: what was asked for cannot start.
        SystemExit: a rank failed; with its exit status.
    """
    if status := _launch(args):
        raise SystemExit(status)


def _validate_launch_command(args: argparse.Namespace) -> tuple[argparse.Namespace, ClusterConfig | None, bool]:
    """Adds the launch configuration to what `launch_command_parser()` has read, for programs that look at it.

    Returns:
        `args` itself; the launch configuration, None without one; whether `mixed_precision` comes from it.

    Raises:
        ConfigError: the launch configuration or an option cannot work.
    """
    from zeroaccel.commands.config.config_args import load_config_from_file

    path, settings = configuration(args), settle(args)
    if problems := _option_problems(settings):
        raise ConfigError.join(problems)
    vars(args).update(vars(settings.options))
    return args, None if path is None else load_config_from_file(path), "mixed_precision" in settings.places


def _launch(typed: argparse.Namespace) -> int:
    settings = settle(typed)
    check(settings)
    tell(settings)
    job = plan(settings, _count_devices(settings))
    if settings.options.dry_run:
        print(job.describe())
        return 0
    return job.run()


# --- what cannot start ----------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Refuses what cannot start, whatever the machine.

    Raises:
        ConfigError: all that is missing or contradicts itself, at once.
    """
    if problems := [*_script_problems(settings.options), *_option_problems(settings)]:
        raise ConfigError.join(problems)


def _option_problems(settings: Settings) -> list[str]:
    options = settings.options
    problems = []
    if options.cpu and (options.multi_gpu or _gpu_ids(options)):
        asked = settings.given("multi_gpu", "gpu_ids")
        problems.append(f"{settings.name('cpu')} leaves the GPUs alone, {asked} asks for some: leave one side away")
    if options.rdzv_backend not in (None, *RENDEZVOUS):
        problems.append(
            f"{settings.name('rdzv_backend')} is {options.rdzv_backend!r}: write one of {', '.join(RENDEZVOUS)}"
        )
    try:
        _check_plugin(settings)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _script_problems(options: argparse.Namespace) -> list[str]:
    script = options.training_script
    if options.module and options.no_python:
        return ["-m runs a Python module, --no_python a program that is none: leave one away"]
    if options.no_python:
        if shutil.which(script) is None:
            return [f"there is no program {script!r} on the PATH, or it may not be executed (chmod +x)"]
    elif options.module:
        top = script.partition(".")[0]
        here = importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
        if here is None and importlib.util.find_spec(top) is None:
            return [f"there is no module {script!r}: is it installed, or in this folder?"]
    elif os.path.isdir(script) and not os.path.exists(os.path.join(script, "__main__.py")):
        return [f"{script!r} is a folder without a __main__.py: name the script in it"]
    elif not os.path.exists(script):
        return [f"there is no script {script!r} (seen from {os.getcwd()})"]
    return []


def _check_plugin(settings: Settings) -> None:
    """Makes the plugin as every rank will, so that what it refuses is refused before anything starts."""
    asked = fields(settings)
    if not asked.get("use_deepspeed"):
        return
    # Here, for what is not needed costs time at each launch.
    from zeroaccel.config.env_patch import patch_environment
    from zeroaccel.config.plugin import DeepSpeedPlugin

    with patch_environment(**environment.exports(asked)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ranks say them
        try:
            DeepSpeedPlugin()
        except ConfigError as error:
            place = settings.given("deepspeed_config_file")
            raise ConfigError(f"{place}: {error}" if place else str(error)) from None


# --- what starts ----------------------------------------------------------------------------------------------------


def plan(settings: Settings, devices: int) -> Job:
    """The job that the options describe.

    Args:
        settings: the options.
        devices: GPUs that the ranks of this machine will see; 0 to stay on the CPU.

    Raises:
        ConfigError: machines, ranks or GPUs that do not fit together.
    """
    script, variables = _script(settings.options), _variables(settings)
    if launcher := deepspeed_launcher(settings):
        from zeroaccel.commands import launch_deepspeed

        return launch_deepspeed.plan(settings, launcher, script, variables)
    if settings.step is not None and settings.step.task_is_rank:
        return launch_slurm.plan(settings, settings.step, script, variables)
    meeting = _meeting(settings)
    ranks = _local_ranks(settings, meeting.nodes, devices)
    _share_cores(settings.options, variables, ranks)
    if settings.options.enable_cpu_affinity and devices == 0:
        variables |= environment.exports({"cpu_affinity": True})
    options = settings.options
    return ElasticJob(
        script=script,
        environment=variables,
        num_processes=ranks,
        meeting=meeting,
        options=_torchrun_options(settings, devices),
        log_dir=options.log_dir,
        keep_logs=options.tee not in (None, "0"),
    )


def _script(options: argparse.Namespace) -> Script:
    kind: ScriptKind = "module" if options.module else "program" if options.no_python else "file"
    return Script(options.training_script, tuple(options.training_script_args), kind)


def fields(settings: Settings) -> dict[str, object]:
    """Those of `environment.FIELDS` that somebody gave, and `use_deepspeed` where one of them implies it."""
    options = vars(settings.options)
    given = {name: options[name] for name in environment.FIELDS if options.get(name) is not None}
    if any(name in given for name in DEEPSPEED_ONLY):
        given["use_deepspeed"] = True
    if given.get("mixed_precision") == "no" and not settings.typed("mixed_precision"):
        del given["mixed_precision"]  # each configuration has it, so that it is nobody's wish
    beside = [name for name in (*FIELD_KEYS, "mixed_precision") if name in settings.places]
    if given.get("use_deepspeed") and beside:
        given["deepspeed_fields_from_config"] = ",".join(beside)
    return given


def _variables(settings: Settings) -> dict[str, str]:
    """The variables that every rank gets, on whatever machine and in whatever number."""
    variables = environment.exports(fields(settings))
    # As under `accelerate launch`: scripts import from the folder that they are launched from.
    path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), os.getcwd()]
    variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    if gpu_ids := _gpu_ids(settings.options):
        variables["CUDA_VISIBLE_DEVICES"] = gpu_ids
    if threads := settings.options.num_cpu_threads_per_process:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def _share_cores(options: argparse.Namespace, variables: dict[str, str], ranks: int) -> None:
    """Gives each rank its share of the threads, where the user has not chosen."""
    if "OMP_NUM_THREADS" not in variables and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, _cores() // ranks))


def _cores() -> int:
    """Cores that this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_ids(options: argparse.Namespace) -> str | None:
    """The GPUs that were named, None for all."""
    return None if options.gpu_ids in (None, "all") else str(options.gpu_ids)


def _meeting(settings: Settings) -> Meeting:
    """Where the ranks meet.

    Raises:
        ConfigError: all that several machines would have to know of each other.
    """
    options = settings.options
    nodes, node, address, port = (
        getattr(options, name) for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
    )
    nodes = nodes or 1
    backend = options.rdzv_backend or "static"
    problems = []
    if node is not None and node >= nodes:
        problems.append(
            f"{settings.name('machine_rank')} is {node}, but machines are numbered from 0 to {nodes - 1}: write"
            f" --num_machines, or another rank"
        )
    if nodes > 1 and address is None:
        problems.append(f"{nodes} machines need --main_process_ip, the address of machine 0")
    if nodes > 1 and port == 0:
        problems.append(f"{settings.name('main_process_port')} is 0, but {nodes} machines cannot guess a free port")
    if nodes > 1 and node is None and backend == "static":
        problems.append(f"which of the {nodes} machines is this? Write --machine_rank, 0 to {nodes - 1}")
    if problems:
        raise ConfigError.join(problems)
    if nodes == 1:
        return Meeting(address or "127.0.0.1", port or None)
    return Meeting(address, port or DEFAULT_PORT, nodes, node, backend)


def _local_ranks(settings: Settings, nodes: int, devices: int) -> int:
    """Ranks to start on this machine."""
    options, gpu_ids = settings.options, _gpu_ids(settings.options)
    if devices == 0 and (options.multi_gpu or gpu_ids):
        asked = settings.given("gpu_ids" if gpu_ids else "multi_gpu") + (f" {gpu_ids}" if gpu_ids else "")
        raise ConfigError(f"{asked}, but no GPU is visible: leave it away to train on the CPU")
    total = options.num_processes
    if total is not None and total % nodes:
        raise ConfigError(
            f"{settings.name('num_processes')} is {total}, the ranks of all {nodes} machines together: write a multiple"
            f" of {nodes}"
        )
    ranks = total // nodes if total else max(len(gpu_ids.split(",")) if gpu_ids else devices, 1)
    if 0 < devices < ranks:
        raise ConfigError(
            f"{ranks} ranks, but {devices} GPU(s) are visible: ask for --num_processes {devices * nodes}, or add --cpu"
        )
    return ranks


def _torchrun_options(settings: Settings, devices: int) -> tuple[str, ...]:
    """What else torch's launcher is told.

    Raises:
        ConfigError: the machine has not what an option needs.
    """
    options = settings.options
    arguments = [f"--max_restarts={options.max_restarts or 0}"]
    given = {name: getattr(options, name) for name in ("monitor_interval", "tee", "role", "rdzv_conf")}
    given["rdzv_conf"] = _rendezvous_settings(options)
    arguments += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if options.enable_cpu_affinity and devices > 0:
        if shutil.which("numactl") is None:
            raise ConfigError(
                f"{settings.name('enable_cpu_affinity')} needs numactl to bind ranks to the cores beside their GPU:"
                " install it (apt-get install numactl), or leave the option away"
            )
        arguments.append("--numa_binding=node")
    return tuple(arguments)


def _rendezvous_settings(options: argparse.Namespace) -> str | None:
    """What was typed; with c10d also who hosts it, for torch guesses it from names, and several can match."""
    typed: str | None = options.rdzv_conf
    known = (options.num_machines or 1) > 1 and options.rdzv_backend == "c10d" and options.machine_rank is not None
    if not known or "is_host=" in (typed or ""):
        return typed
    return ",".join(filter(None, (typed, f"is_host={int(options.machine_rank == 0)}")))


def _count_devices(settings: Settings) -> int:
    """GPUs of this machine; 0 where nobody has to know."""
    rank_of_slurm = settings.step is not None and settings.step.task_is_rank
    if settings.options.cpu or rank_of_slurm or deepspeed_launcher(settings):
        return 0
    if gpu_ids := _gpu_ids(settings.options):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_ids  # before torch counts
    from zeroaccel.commands import launch_elastic

    return launch_elastic.device_count()


def main() -> int:
    """`zeroaccel launch` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["launch", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
