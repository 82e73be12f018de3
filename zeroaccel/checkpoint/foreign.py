"""Folders of Accelerate's `save_state` and of DeepSpeed's `save_checkpoint`, loaded as their writers would."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch

from zeroaccel.checkpoint import files, manifest
from zeroaccel.checkpoint.contents import Contents
from zeroaccel.checkpoint.load import What
from zeroaccel.config.constants import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_WEIGHTS_NAME,
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


def _numbered(name: str, number: int) -> str:
    """Accelerate's name of the second file of a kind and of those behind it: `scheduler_1.bin`."""
    stem, dot, suffix = name.partition(".")
    return name if number == 0 else f"{stem}_{number}{dot}{suffix}"


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
    for number, model in enumerate(models):
        if what.weights is None or number in what.weights:
            if hasattr(model, "load_checkpoint"):
                _load_engine(model, number, folder, what)
            else:
                _load_plain(model, number, folder)
    engines = any(hasattr(model, "load_checkpoint") for model in models)
    for number, optimizer in enumerate([] if engines or not what.optimizer else optimizers):
        _apply(optimizer.load_state_dict, os.path.join(folder, _numbered(f"{OPTIMIZER_NAME}.bin", number)))
    for number, scheduler in enumerate(contents.schedulers if what.schedulers else []):
        path = os.path.join(folder, _numbered(f"{SCHEDULER_NAME}.bin", number))
        if not engines or os.path.exists(path):  # the engine has loaded what it steps itself
            _apply(scheduler.load_state_dict, path)
    if what.rest:
        for number, one in enumerate(contents.objects):
            _apply(one.load_state_dict, os.path.join(folder, f"custom_checkpoint_{number}.pkl"), **what.options)
    return _set_random_states(folder) if what.rest else None


def _load_engine(model: Any, number: int, folder: str, what: What) -> None:
    named = _numbered(MODEL_NAME, number)
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


def _load_plain(model: Any, number: int, folder: str) -> None:
    safe = os.path.join(folder, _numbered(SAFE_WEIGHTS_NAME, number))
    if os.path.exists(safe):
        import safetensors.torch

        # Without this strictness tied weights, which are stored once, would be missing.
        missing, unexpected = safetensors.torch.load_model(model, safe, strict=False)
        if missing or unexpected:
            raise CheckpointError(f"{safe} does not fit {type(model).__name__}: {[*missing, *unexpected]}")
        return
    _apply(model.load_state_dict, os.path.join(folder, _numbered(WEIGHTS_NAME, number)))


def _apply(load_state_dict: Callable[[Any], object], path: str, **options: Any) -> None:
    try:
        state = files.load(path, **{"map_location": "cpu", **options})
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, numbers and containers, and reading that runs code of the file. If you"
            ' trust it: load_state(folder, load_kwargs={"weights_only": False})'
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    load_state_dict(state)


def _set_random_states(folder: str) -> int | None:
    rank = PartialState().process_index
    path = os.path.join(folder, f"{RNG_STATE_NAME}_{rank}.pkl")
    if not os.path.exists(path):
        logger.warning(f"{path} is not there: rank {rank} goes on with its own random states")
        return None
    states = files.load(path)
    random.setstate(states["random_state"])
    numpy.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])
    step: int | None = states.get("step")
    return step
