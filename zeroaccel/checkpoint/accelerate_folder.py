"""The files that Accelerate's `save_state` writes without DeepSpeed, and beside DeepSpeed's: written and read.

`load_state` reads such folders; `zeroaccel.checkpointing` has the functions for scripts that call them themselves.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from zeroaccel.checkpoint import files
from zeroaccel.checkpoint.safe_values import from_safe, to_safe
from zeroaccel.config.constants import (
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_WEIGHTS_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    WEIGHTS_NAME,
)
from zeroaccel.errors import CheckpointError, ConfigTypeError
from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)

LOADER_NAME = "dl_state_dict"


def numbered(name: str, number: int) -> str:
    """Name of the second file of a kind and of those behind it: `scheduler_1.bin`."""
    stem, dot, suffix = name.partition(".")
    return name if number == 0 else f"{stem}_{number}{dot}{suffix}"


def custom_name(number: int) -> str:
    """File of a registered object."""
    return f"custom_checkpoint_{number}.pkl"


# --- writing ----------------------------------------------------------------------------------------------------------


def save_accelerator_state(
    output_dir: str | os.PathLike[str],
    model_states: Sequence[Mapping[str, Any]],
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    dataloaders: Sequence[Any],
    process_index: int,
    step: int,
    scaler: Any = None,
    save_on_each_node: bool = False,
    safe_serialization: bool = True,
) -> Path:
    """Writes states into a folder that is there: rank 0 what all have in common, each rank its random states.

    Unlike `accelerator.save_state` it knows nothing of ZeRO, and a kill leaves a half-written folder.

    Args:
        output_dir: the folder.
        model_states: state dicts.
        optimizers, schedulers: anything with `state_dict`.
        dataloaders: prepared ones; with `use_stateful_dataloader` their positions are kept.
        process_index: this rank.
        step: blocks of `accumulate()` in the open window.
        scaler: fp16's gradient scaler.
        save_on_each_node: the first rank of every node writes, not only rank 0.
        safe_serialization: the model as safetensors, else as `torch.save` writes it.

    Returns:
        The folder.
    """
    folder = Path(output_dir)

    def write(value: Any, name: str, number: int = 0, safe: bool = False) -> None:
        files.save(value, folder / numbered(name, number), save_on_each_node, safe)

    for number, state in enumerate(model_states):
        write(state, SAFE_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME, number, safe_serialization)
    for name, holders in ((OPTIMIZER_NAME, optimizers), (SCHEDULER_NAME, schedulers)):
        for number, holder in enumerate(holders):
            write(holder.state_dict(), f"{name}.bin", number)
    for number, loader in enumerate(dataloaders):
        if getattr(loader, "use_stateful_dataloader", False):
            write(to_safe(loader.state_dict(), "the loader's state_dict()"), f"{LOADER_NAME}.bin", number)
    if scaler is not None:
        write(scaler.state_dict(), SCALER_NAME)
    states = {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": numpy.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    with files.replacing(str(folder / f"{RNG_STATE_NAME}_{process_index}.pkl")) as temporary:
        torch.save(states, temporary)
    return folder


def save_custom_state(obj: Any, path: str | os.PathLike[str], index: int = 0, save_on_each_node: bool = False) -> None:
    """Writes the `state_dict()` of an object as `custom_checkpoint_<index>.pkl` into the folder `path`.

    Raises:
        UsageError: loading it could run code.
    """
    state = to_safe(obj.state_dict(), f"{type(obj).__name__}.state_dict()")
    files.save(state, Path(path) / custom_name(index), save_on_each_node)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], **options: Any) -> Any:
    """What a file holds, with tensors on the CPU unless `options` of `torch.load` say another place.

    Raises:
        CheckpointError: it cannot be read, or reading it would run code.
    """
    try:
        return from_safe(files.load(path, **{"map_location": "cpu", **options}))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, numbers and containers, and reading that runs code of the file. If you"
            ' trust it: load_state(folder, load_kwargs={"weights_only": False})'
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_weights(model: torch.nn.Module, folder: str | os.PathLike[str], number: int = 0, strict: bool = True) -> None:
    """Loads a model's file.

    Raises:
        CheckpointError: it cannot be read, or with `strict` names differ.
    """
    safe = os.path.join(folder, numbered(SAFE_WEIGHTS_NAME, number))
    if not os.path.exists(safe):
        model.load_state_dict(read(os.path.join(folder, numbered(WEIGHTS_NAME, number))), strict=strict)
        return
    import safetensors.torch

    # Strictly, tied weights would be missing, which are stored once.
    missing, unexpected = safetensors.torch.load_model(model, safe, strict=False)
    if strict and (missing or unexpected):
        raise CheckpointError(f"{safe} does not fit {type(model).__name__}: {[*missing, *unexpected]}")


def set_random_states(folder: str | os.PathLike[str], rank: int) -> int | None:
    """Sets a rank's random states.

    Returns:
        Blocks of `accumulate()` in the window that was open, where the file says it.
    """
    path = os.path.join(folder, f"{RNG_STATE_NAME}_{rank}.pkl")
    if not os.path.exists(path):
        logger.warning(f"{path} is not there: rank {rank} goes on with its own random states")
        return None
    states = read(path)
    random.setstate(states["random_state"])
    numpy.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])
    step: int | None = states.get("step")
    return step


def load_accelerator_state(
    input_dir: str | os.PathLike[str],
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    dataloaders: Sequence[Any],
    process_index: int,
    scaler: Any = None,
    map_location: Any = None,
    load_kwargs: Mapping[str, Any] | None = None,
    **load_model_func_kwargs: Any,
) -> dict[str, Any]:
    """Loads what `save_accelerator_state` wrote, here or in Accelerate.

    Args:
        input_dir: the folder.
        models, optimizers, schedulers, dataloaders, scaler: as they were saved.
        process_index: this rank.
        map_location: of optimizer states while they are read: None or "cpu", or "on_device".
        load_kwargs: of `torch.load`, for states of optimizers, schedulers and loaders.
        load_model_func_kwargs: `strict=False` ignores names that only the file or only the model has.

    Returns:
        `{"step": n}` where the folder says it.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit.
    """
    if map_location not in (None, "cpu", "on_device"):
        raise ConfigTypeError(f"map_location={map_location!r}: write None, 'cpu' or 'on_device'")
    folder, options = Path(input_dir), dict(load_kwargs or {})
    device = PartialState().device if map_location == "on_device" else "cpu"
    for number, model in enumerate(models):
        load_weights(model, folder, number, **load_model_func_kwargs)
    for number, optimizer in enumerate(optimizers):
        state = read(folder / numbered(f"{OPTIMIZER_NAME}.bin", number), **{"map_location": device, **options})
        optimizer.load_state_dict(state)
    for number, scheduler in enumerate(schedulers):
        scheduler.load_state_dict(read(folder / numbered(f"{SCHEDULER_NAME}.bin", number), **options))
    for number, loader in enumerate(dataloaders):
        path = folder / numbered(f"{LOADER_NAME}.bin", number)
        if getattr(loader, "use_stateful_dataloader", False) and path.exists():
            loader.load_state_dict(read(path, **options))
    if scaler is not None:
        scaler.load_state_dict(read(folder / SCALER_NAME))
    step = set_random_states(folder, process_index)
    return {} if step is None else {"step": step}


def load_custom_state(obj: Any, path: str | os.PathLike[str], index: int = 0) -> None:
    """Loads an object from `custom_checkpoint_<index>.pkl` in the folder `path`."""
    obj.load_state_dict(read(Path(path) / custom_name(index)))
