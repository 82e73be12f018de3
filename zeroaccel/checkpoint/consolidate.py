"""From a checkpoint of a training run to weights for everybody: on one machine without GPU, tensor by tensor.

Reads the folders of `accelerator.save_state` and of `engine.save_checkpoint`, of any number of ranks and ZeRO stage.
Neither DeepSpeed nor a process group is needed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from zeroaccel.checkpoint import folders, manifest
from zeroaccel.checkpoint.deepspeed_folder import DeepSpeedFolder
from zeroaccel.checkpoint.fragments import Fragments
from zeroaccel.checkpoint.load_weights import load_tensors
from zeroaccel.checkpoint.progress import measured
from zeroaccel.checkpoint.tensor_file import Layout
from zeroaccel.checkpoint.weight_files import Export, Weight, check_folder
from zeroaccel.config.generic import convert_file_size_to_int
from zeroaccel.config.options import ProjectConfiguration
from zeroaccel.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SPELLINGS = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_CHUNK = 2**22  # elements of a fragment in memory at once


def consolidate(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str | torch.dtype = "fp32",
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    *,
    tag: str | None = None,
    model: int = 0,
    exclude_frozen_parameters: bool = False,
) -> list[str]:
    """Writes a checkpoint's weights as files that `from_pretrained` and `load_checkpoint_in_model` read.

    Args:
        checkpoint: folder of `save_state` (or of its numbered checkpoints: the newest one), or of `save_checkpoint`.
        output: folder; is made. Weight files of an older export there are replaced once the new ones are complete.
        dtype: "fp32", "bf16" or "fp16", of everything that is floating-point.
        max_shard_size: of a file, a number of bytes or a text such as "5GB".
        safe_serialization: safetensors with tied weights once; else `torch.save`.
        tag: of DeepSpeed's checkpoint; default: the one that `latest` names.
        model: number of the model, where `save_state` saved several.
        exclude_frozen_parameters: leave out what needed no gradient.

    Returns:
        Names of the files.

    Raises:
        ConfigError: an argument cannot be.
        CheckpointError: the checkpoint is damaged or incomplete, or the output cannot be written.
    """
    folder, limit = check_folder(output), convert_file_size_to_int(max_shard_size)
    kind = _dtype(dtype)
    weights = [_cast(weight, kind) for weight in stored_weights(checkpoint, tag, model, exclude_frozen_parameters)]
    return Export(folder, weights, limit, safe_serialization).run(f"weights written to {folder}")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    name = _SPELLINGS.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: write one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _cast(weight: Weight, dtype: torch.dtype) -> Weight:
    if not weight.dtype.is_floating_point:
        return weight
    return replace(weight, layout=replace(weight.layout, dtype=dtype))


def stored_weights(
    checkpoint: str | os.PathLike[str],
    tag: str | None = None,
    model: int = 0,
    exclude_frozen_parameters: bool = False,
) -> list[Weight]:
    """A checkpoint's weights; each is read when its `pieces` are asked for. See `consolidate`."""
    folder = os.fspath(checkpoint)
    if not os.path.isdir(folder):
        raise ConfigError(f"there is no folder {folder!r}")
    own = _own_folder(folder)
    if own is None:
        return DeepSpeedFolder(folder, tag).weights(exclude_frozen_parameters)
    if tag is not None:
        raise ConfigError(f"{own} was written by save_state, which has no tags: leave tag={tag!r} out")
    return _of_manifest(own, model, exclude_frozen_parameters)


def _own_folder(folder: str) -> str | None:
    """Folder of a checkpoint of `save_state`: this one, or the newest complete of the numbered ones in it."""
    if os.path.exists(os.path.join(folder, manifest.NAME)):
        return folder
    above, name = os.path.split(os.path.abspath(folder))
    project = ProjectConfiguration(project_dir=above if name == "checkpoints" else folder)
    return folders.newest(project)


def _of_manifest(folder: str, number: int, exclude_frozen_parameters: bool) -> list[Weight]:
    found = manifest.read(folder)
    if not 0 <= number < len(found.models):
        raise ConfigError(f"{folder} holds {len(found.models)} models, counted from 0: there is no model {number}")
    model = found.models[number]
    size = sum(file.size for file in found.files if file.name in model.files)
    with measured(f"{folder} verified", size) as progress:
        manifest.verify(folder, found, model.files, progress)
    if model.left_out and not exclude_frozen_parameters:
        raise CheckpointError(
            f"{folder} was saved without its {len(model.left_out)} frozen parameters: write"
            " exclude_frozen_parameters to get the others"
        )
    stored = Fragments([found.path(folder, name) for name in model.files])
    left_out = set(model.frozen) if exclude_frozen_parameters else set()
    aliases: dict[str, list[str]] = {}
    for other, name in model.tied.items():
        aliases.setdefault(name, []).append(other)
    shapes = {("weight", name): shape for name, shape in model.shapes.items() if name not in left_out}
    shapes |= {("buffer", name): shape for name, shape in model.buffers.items()}
    return [
        _of_fragments(stored, kind, name, tuple(shape), tuple(aliases.get(name, ())))
        for (kind, name), shape in shapes.items()
    ]


def _of_fragments(stored: Fragments, kind: str, name: str, shape: tuple[int, ...], aliases: tuple[str, ...]) -> Weight:
    # Nothing stands in the files of a tensor without elements.
    dtype = stored.dtype(kind, name) if stored.has(kind, name) else torch.float32
    layout = Layout(name, dtype, shape)
    return Weight(layout, partial(_read, stored, kind, layout), aliases)


def _read(stored: Fragments, kind: str, layout: Layout) -> Iterator[torch.Tensor]:
    size = layout.nbytes // layout.dtype.itemsize
    for start in range(0, size, _CHUNK):
        piece = torch.empty(min(_CHUNK, size - start), dtype=layout.dtype)
        stored.read(kind, layout.name, start, piece)
        yield piece


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str], tag: str | None = None, exclude_frozen_parameters: bool = False
) -> dict[str, Any]:
    """The weights of a checkpoint in memory, in fp32; tied names share a tensor. See `consolidate`.

    Args:
        checkpoint_dir: folder of `save_state` or of `save_checkpoint`.
        tag: of DeepSpeed's checkpoint; default: the one that `latest` names.
        exclude_frozen_parameters: leave out what needed no gradient.
    """
    state: dict[str, Any] = OrderedDict()
    for weight in stored_weights(checkpoint_dir, tag, exclude_frozen_parameters=exclude_frozen_parameters):
        layout = _cast(weight, torch.float32).layout
        value, start = torch.empty(layout.shape, dtype=layout.dtype), 0
        for piece in weight.pieces():
            value.view(-1)[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
        state |= dict.fromkeys((layout.name, *weight.aliases), value)
    return state


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """Moves a model to the CPU and loads a checkpoint's weights into it.

    Args:
        model: one that is not prepared.
        checkpoint_dir, tag: see `get_fp32_state_dict_from_zero_checkpoint`.

    Returns:
        The model.
    """
    model.cpu()
    load_tensors(model, get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), False, os.fspath(checkpoint_dir))
    return model
