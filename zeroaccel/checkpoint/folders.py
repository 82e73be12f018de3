"""Which folder a checkpoint goes into and comes from: named by the script, or numbered."""

from __future__ import annotations

import os
import re

from zeroaccel.checkpoint import manifest
from zeroaccel.config.options import ProjectConfiguration
from zeroaccel.errors import CheckpointError, ConfigError

_NUMBERED = re.compile(r"checkpoint_(\d+)")


def _root(project: ProjectConfiguration) -> str:
    """Folder of the numbered checkpoints."""
    if project.project_dir is None:
        raise ConfigError(
            "automatic_checkpoint_naming needs a folder: pass Accelerator(project_dir=...) or"
            " ProjectConfiguration(project_dir=...)"
        )
    return os.path.join(project.project_dir, "checkpoints")


def numbered(project: ProjectConfiguration) -> dict[int, str]:
    """The numbered checkpoints of a project, complete or not: number -> folder, in order."""
    root = _root(project)
    names = os.listdir(root) if os.path.isdir(root) else []
    found = {int(match[1]): os.path.join(root, name) for name in names if (match := _NUMBERED.fullmatch(name))}
    return dict(sorted(found.items()))


def to_save(output_dir: str | os.PathLike[str] | None, project: ProjectConfiguration) -> str:
    """The folder of the next checkpoint.

    Args:
        output_dir: the script's; with automatic naming the number counts instead.
        project: where numbered checkpoints are.

    Raises:
        ConfigError: neither is given.
    """
    if project.automatic_checkpoint_naming:
        return os.path.join(_root(project), f"checkpoint_{project.iteration}")
    if output_dir is None:
        raise ConfigError(
            "save_state needs a folder: save_state(output_dir), or"
            " ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True)"
        )
    return os.path.expanduser(os.fspath(output_dir))


def check_free(folder: str) -> None:
    """Refuses a numbered folder that holds something. What a killed save has left is free to use.

    Raises:
        ConfigError: it is taken.
    """
    if os.path.isdir(folder) and os.listdir(folder) and not manifest.has_leftovers(folder):
        raise ConfigError(
            f"{folder} is there already: set ProjectConfiguration(iteration=...) to the number to go on with, or call"
            " load_state() first, which sets it"
        )


def to_load(input_dir: str | os.PathLike[str] | None, project: ProjectConfiguration) -> str:
    """The folder to load from: `input_dir`, or the newest complete numbered one.

    Raises:
        ConfigError: it does not exist, or nothing says which.
        CheckpointError: no numbered checkpoint is complete.
    """
    if input_dir is not None:
        folder = os.path.expanduser(os.fspath(input_dir))
        if not os.path.isdir(folder):
            raise ConfigError(f"the folder {folder!r} does not exist")
        return folder
    check_numbers(project)
    found = newest(project)
    if found is None:
        raise CheckpointError(f"{_root(project)} holds no complete checkpoint")
    return found


def check_numbers(project: ProjectConfiguration) -> None:
    """Refuses a project that numbers no checkpoints.

    Raises:
        ConfigError: it does not.
    """
    if not project.automatic_checkpoint_naming:
        raise ConfigError(
            "the newest checkpoint is the newest of the numbered ones, which need"
            " ProjectConfiguration(project_dir=..., automatic_checkpoint_naming=True); without, name the folder:"
            " load_state(folder)"
        )


def newest(project: ProjectConfiguration) -> str | None:
    """The newest complete numbered checkpoint; None where there is none."""
    return next((folder for folder in reversed(numbered(project).values()) if manifest.is_complete(folder)), None)


def number_of(folder: str, project: ProjectConfiguration) -> int | None:
    """Number of a numbered checkpoint of this project; None for another folder."""
    if not project.automatic_checkpoint_naming or project.project_dir is None:
        return None
    same = (number for number, path in numbered(project).items() if os.path.samefile(path, folder))
    return next(same, None)


def prune(project: ProjectConfiguration, newest: str) -> None:
    """Removes the oldest numbered checkpoints beyond `total_limit`, and what killed saves have left.

    Args:
        project: says how many to keep.
        newest: folder of the one that was just saved, which stays.
    """
    found = [path for path in numbered(project).values() if not os.path.samefile(path, newest)]
    for path in [path for path in found if manifest.has_leftovers(path)]:
        manifest.remove(path)
        found.remove(path)
    if project.total_limit is not None:
        for path in found[: max(0, len(found) + 1 - max(1, project.total_limit))]:
            manifest.remove(path)
