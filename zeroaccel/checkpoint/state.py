"""`save_state` and `load_state`: folders, hooks, then the save or the load itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from zeroaccel.checkpoint import folders, foreign
from zeroaccel.checkpoint.agreement import together
from zeroaccel.checkpoint.contents import Contents
from zeroaccel.checkpoint.hooks import Hooks, LazyWeights
from zeroaccel.checkpoint.load import What, load
from zeroaccel.checkpoint.save import Save
from zeroaccel.config.options import ProjectConfiguration
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.state import PartialState

_SAVE_OPTIONS = ("exclude_frozen_parameters",)
_LOAD_OPTIONS = (
    *("load_module_only", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states"),
    *("strict", "map_location"),  # of Accelerate's plain path
)
_REMEDIES = {
    "client_state": "give its object state_dict and load_state_dict, and call register_for_checkpointing(object)",
    "tag": "name the folder",
}

Folder = str | os.PathLike[str] | None


class Checkpoints:
    """The checkpoints of one `Accelerator`.

    Args:
        project: where numbered ones are, and how many of them are kept.
    """

    def __init__(self, project: ProjectConfiguration) -> None:
        self.project = project
        self.before_save = Hooks()
        self.before_load = Hooks()

    def save(
        self,
        contents: Contents,
        models: list[Any],
        output_dir: Folder,
        options: Mapping[str, Any],
        weights_of: Callable[[Any], dict[str, Any] | None],
    ) -> str:
        """Saves. Collective.

        Args:
            contents: what is saved.
            models: what the script holds of each.
            output_dir: the script's folder.
            options: `exclude_frozen_parameters`.
            weights_of: puts a model's weights together, for hooks.

        Returns:
            The folder.
        """
        _refuse_unknown("save_state", options, _SAVE_OPTIONS)
        main = PartialState().is_main_process
        doing = "saving a checkpoint"
        folder = str(together(lambda: folders.to_save(output_dir, self.project) if main else None, doing)[0])
        saving = Save(contents, folder, **options)
        check = partial(folders.check_free, folder) if self.project.automatic_checkpoint_naming else None
        saving.begin(check)
        weights = [LazyWeights(partial(weights_of, model)) for model in models]
        together(lambda: self.before_save.run(list(models), weights, folder), f"the hooks before saving into {folder}")
        saving.write()
        self.project.iteration += 1
        if self.project.automatic_checkpoint_naming:
            together(lambda: folders.prune(self.project, folder) if main else None, "removing old checkpoints")
        return folder

    def load(
        self,
        contents: Contents,
        models: list[Any],
        optimizers: list[Any],
        input_dir: Folder,
        load_kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> int | None:
        """Loads. Collective.

        Args:
            contents: the run.
            models, optimizers: what the script holds of them.
            input_dir: the script's folder, None for the newest numbered one.
            load_kwargs: of `torch.load`, for registered objects.
            options: `load_module_only` and so on.

        Returns:
            Blocks of `accumulate()` in the window that was open; None where only weights were loaded.
        """
        _refuse_unknown("load_state", options, _LOAD_OPTIONS)
        main = PartialState().is_main_process
        doing = "loading a checkpoint"
        found = together(lambda: self._find(input_dir) if main else None, doing)[0]
        folder, is_foreign = found or ("", False)
        left = list(models)
        together(lambda: self.before_load.run(left, folder), f"the hooks before loading {folder}")
        taken = {number for number, model in enumerate(models) if any(model is one for one in left)}
        everything = not options.get("load_module_only", False)
        what = What(
            weights=taken,
            optimizer=everything and options.get("load_optimizer_states", True),
            schedulers=everything and options.get("load_lr_scheduler_states", True),
            rest=everything,
            strict=options.get("strict", True) and options.get("load_module_strict", True),
            options=dict(load_kwargs or {}),
        )
        step = foreign.load(contents, models, optimizers, folder, what) if is_foreign else load(contents, folder, what)
        number = folders.number_of(folder, self.project)
        if number is not None:
            self.project.iteration = max(self.project.iteration, number + 1)
        return step if everything else None

    def newest(self) -> str | None:
        """Folder of the newest complete numbered checkpoint, None before the first. Collective.

        Raises:
            ConfigError: the project has no folder, or numbers no checkpoints.
        """
        main = PartialState().is_main_process
        return together(lambda: self._newest() if main else None, "looking for a checkpoint")[0]

    def _newest(self) -> str | None:
        folders.check_numbers(self.project)
        return folders.newest(self.project)

    def _find(self, input_dir: Folder) -> tuple[str, bool]:
        folder = folders.to_load(input_dir, self.project)
        return folder, foreign.is_foreign(folder)


def _refuse_unknown(function: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(options) - set(known)):
        remedies = "".join(f"; {_REMEDIES[name]} instead of {name}" for name in unknown if name in _REMEDIES)
        raise UnsupportedError(f"{function} takes no {', '.join(unknown)}: it takes {', '.join(known)}{remedies}")


def check_registrable(objects: tuple[Any, ...]) -> None:
    """Refuses what cannot be saved and loaded again.

    Raises:
        ConfigError: names each object without `state_dict` and `load_state_dict`.
    """
    lacking = [
        f"\n  Item at index {number}: {type(one).__name__}"
        for number, one in enumerate(objects)
        if not callable(getattr(one, "state_dict", None)) or not callable(getattr(one, "load_state_dict", None))
    ]
    if lacking:
        raise ConfigError(
            "register_for_checkpointing needs objects with both state_dict and load_state_dict, which are lacking in:"
            f"{''.join(lacking)}"
        )
