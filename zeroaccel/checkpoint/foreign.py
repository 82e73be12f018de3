"""Folders of Accelerate's `save_state` and of DeepSpeed's `save_checkpoint`, loaded as their writers would."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from zeroaccel.checkpoint import accelerate_folder, manifest
from zeroaccel.checkpoint.accelerate_folder import LOADER_NAME, custom_name, numbered, read
from zeroaccel.checkpoint.agreement import together
from zeroaccel.checkpoint.contents import Contents
from zeroaccel.checkpoint.load import What
from zeroaccel.config.constants import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    SAFE_WEIGHTS_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    WEIGHTS_NAME,
)
from zeroaccel.errors import CheckpointError
from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)


def is_foreign(folder: str) -> bool:
    """Whether a folder is none of ours, and one of theirs."""
    names = os.listdir(folder)
    known = ("latest", MODEL_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
    return manifest.NAME not in names and any(name in names for name in known)


def load(contents: Contents, models: list[Any], optimizers: list[Any], folder: str, what: What) -> int | None:
    """Loads models and optimizers, schedulers, registered objects and random states. Collective.

    Args:
        contents: the run.
        models, optimizers: what the script holds of them.
        folder: theirs.
        what: shall be loaded.

    Returns:
        Blocks of `accumulate()` in the window that was open, where the folder says it.

    Raises:
        CheckpointError: something is missing or does not fit. DeepSpeed's own errors, where its engine loads: it needs
            the same number of ranks, ZeRO stage and offload.
    """
    taken = [(number, model) for number, model in enumerate(models) if what.weights is None or number in what.weights]
    engines = any(hasattr(model, "load_checkpoint") for model in models)
    for number, model in taken if engines else []:
        _load_engine(model, number, folder, what)
    if not engines:
        together(partial(_load_plain, contents, taken, optimizers, folder, what), f"loading {folder}")
    found = together(partial(_load_rest, contents, engines, folder, what), f"loading {folder}")
    return found[PartialState().process_index]


def _load_engine(model: Any, number: int, folder: str, what: What) -> None:
    named = numbered(MODEL_NAME, number)
    tag = named if os.path.isdir(os.path.join(folder, named)) else None  # that of the file `latest`
    logger.warning(f"{folder} was written by DeepSpeed, which unpickles it: load only what you trust")
    path, _ = model.load_checkpoint(
        folder,
        tag=tag,
        load_module_strict=what.strict,
        load_optimizer_states=what.optimizer,
        load_lr_scheduler_states=what.schedulers,
        load_module_only=not what.rest,
    )
    if path is None:
        raise CheckpointError(f"DeepSpeed found no checkpoint {tag or 'that the file latest names'} in {folder}")


def _load_plain(
    contents: Contents, models: list[tuple[int, Any]], optimizers: list[Any], folder: str, what: What
) -> None:
    """What DeepSpeed's engine loads otherwise."""
    for number, model in models:
        accelerate_folder.load_weights(model, folder, number, what.strict)
    for number, optimizer in enumerate(optimizers if what.optimizer else []):
        optimizer.load_state_dict(read(os.path.join(folder, numbered(f"{OPTIMIZER_NAME}.bin", number))))
    scaler = os.path.join(folder, SCALER_NAME)
    if what.rest and os.path.exists(scaler):
        state = read(scaler)
        for share in contents.shares:
            share.set_counters({"cur_scale": state["scale"], "grad_scaler": state})


def _load_rest(contents: Contents, engines: bool, folder: str, what: What) -> int | None:
    for number, scheduler in enumerate(contents.schedulers if what.schedulers else []):
        path = os.path.join(folder, numbered(f"{SCHEDULER_NAME}.bin", number))
        if not engines or os.path.exists(path):  # the engine has loaded what it steps itself
            scheduler.load_state_dict(read(path))
    if not what.rest:
        return None
    for number, one in enumerate(contents.objects):
        one.load_state_dict(read(os.path.join(folder, custom_name(number)), **what.options))
    if os.path.exists(os.path.join(folder, f"{LOADER_NAME}.bin")):
        logger.warning(f"{folder} holds positions of loaders as torchdata keeps them: they are not taken over")
    return accelerate_folder.set_random_states(folder, PartialState().process_index)
