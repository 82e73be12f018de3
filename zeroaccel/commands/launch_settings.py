"""Who wins: what was typed, else what SLURM says of the machines, else the launch configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from zeroaccel.commands import launch_slurm
from zeroaccel.commands.launch_options import DEEPSPEED_ONLY
from zeroaccel.commands.launch_slurm import Step
from zeroaccel.errors import ConfigError

FILTERS = ("deepspeed_inclusion_filter", "deepspeed_exclusion_filter")
_RUNNER = ("deepspeed_multinode_launcher", "deepspeed_hostfile", *FILTERS)


@dataclass
class Settings:
    """The options as they hold.

    Attributes:
        options: each option's value; None where nobody said anything.
        places: of the options that were not typed, where each was said: a line of a file, a variable.
        step: the SLURM job step to run in, if it has more than one task.
        notes: lines about what was overruled, for stderr.
    """

    options: argparse.Namespace
    places: dict[str, str] = field(default_factory=dict)
    step: Step | None = None
    notes: list[str] = field(default_factory=list)

    def typed(self, name: str) -> bool:
        """Whether an option was given on the command line."""
        return getattr(self.options, name) is not None and name not in self.places

    def name(self, option: str) -> str:
        """An option as a message names it: `--zero_stage`, or `zero_stage (conf.yaml:7)`."""
        return f"{option} ({self.places[option]})" if option in self.places else f"--{option}"

    def given(self, *names: str) -> str:
        """The same for those of several options that have a value."""
        return ", ".join(self.name(name) for name in names if getattr(self.options, name) is not None)


def settle(typed: argparse.Namespace) -> Settings:
    """Adds to what was typed what the launch configuration and SLURM say.

    Raises:
        ConfigError: the launch configuration cannot be read, or something in it cannot work.
    """
    settings = Settings(argparse.Namespace(**vars(typed)))
    from_file = _without_outdone(_read_file(typed), settings)
    if typed.deepspeed_hostfile is None and typed.deepspeed_multinode_launcher in (None, "standard"):
        settings.step = launch_slurm.step()
    if settings.step is not None and typed.num_machines in (None, settings.step.nodes):
        _add_slurm(settings, settings.step, from_file)
    else:
        settings.step = None
    for name, (value, place) in from_file.items():
        _add(settings, name, value, place)
    return settings


def _add(settings: Settings, name: str, value: Any, place: str) -> None:
    if getattr(settings.options, name) is None:
        setattr(settings.options, name, value)
        settings.places[name] = place


Found = dict[str, tuple[Any, str]]


def configuration(typed: argparse.Namespace) -> str | None:
    """Path of the launch configuration that holds; None: none does."""
    if typed.config_file is not None or typed.cpu:
        return None if typed.config_file is None else str(typed.config_file)
    from zeroaccel.config import launch_file  # YAML takes time to load

    path = launch_file.default_path()
    return path if os.path.exists(path) else None


def _read_file(typed: argparse.Namespace) -> Found:
    """The options of the launch configuration, with their places."""
    path = configuration(typed)
    if path is None:
        return {}
    from zeroaccel.config import launch_file

    values, lines = launch_file.read(path), launch_file.lines(path)
    return {name: (value, f"{path}:{lines[name]}") for name, value in values.items()}


def _without_outdone(found: Found, settings: Settings) -> Found:
    """Without what a typed option of another name speaks against."""
    typed = settings.options
    outdone: set[str] = set()
    if typed.cpu:
        outdone |= {"multi_gpu", "gpu_ids"}
    if typed.multi_gpu or typed.gpu_ids:
        outdone |= {"cpu"}
    if typed.multi_gpu and not _any_given(typed, ("use_deepspeed", *DEEPSPEED_ONLY)):
        outdone |= {"use_deepspeed", *DEEPSPEED_ONLY}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "gpu_ids" in found and typed.gpu_ids is None:
        value, place = found["gpu_ids"]
        if value not in ("all", visible):
            settings.notes.append(f"CUDA_VISIBLE_DEVICES={visible} holds, not gpu_ids: {value} ({place})")
        outdone |= {"gpu_ids"}
    return {name: said for name, said in found.items() if name not in outdone}


def _any_given(options: argparse.Namespace, names: Iterable[str]) -> bool:
    return any(getattr(options, name) is not None for name in names)


def _add_slurm(settings: Settings, step: Step, from_file: Found) -> None:
    for name in _RUNNER:  # machines of another day
        from_file.pop(name, None)
    said = {"num_machines": step.nodes, "machine_rank": step.node, "main_process_ip": step.address}
    if step.task_is_rank:
        said["num_processes"] = step.tasks
    for name, value in said.items():
        _add(settings, name, value, "SLURM")
        other, place = from_file.get(name, (value, ""))
        if other != value and name in ("num_machines", "num_processes") and step.task == 0:
            settings.notes.append(f"SLURM's {name} {value} holds, not {other} ({place})")
    if "main_process_port" not in from_file:
        _add(settings, "main_process_port", step.port, "SLURM")


def deepspeed_launcher(settings: Settings) -> str | None:
    """Which of DeepSpeed's launchers is to start the ranks; None: torch's is.

    Raises:
        ConfigError: a hostfile or a filter was typed that nobody would read.
    """
    options = settings.options
    launcher = options.deepspeed_multinode_launcher or ("pdsh" if options.deepspeed_hostfile else "standard")
    alone = options.num_machines == 1 or (options.num_machines is None and not options.deepspeed_hostfile)
    typed = [name for name in ("deepspeed_hostfile", *FILTERS) if settings.typed(name)]
    if typed and (alone or launcher == "standard"):
        other = settings.given("num_machines", "deepspeed_multinode_launcher") or "one machine"
        raise ConfigError(
            f"--{typed[0]} is for DeepSpeed's launchers of several machines, {other} is not: leave one away"
        )
    return None if alone or launcher == "standard" else str(launcher)


def tell(settings: Settings) -> None:
    """Says on stderr what was overruled."""
    for note in settings.notes:
        print(f"zeroaccel launch: {note}", file=sys.stderr)
