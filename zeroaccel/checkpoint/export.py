"""Weights out of a running model: as a dictionary, as files for other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from zeroaccel.checkpoint.agreement import together
from zeroaccel.checkpoint.files import same_weight
from zeroaccel.checkpoint.tensor_file import Layout
from zeroaccel.checkpoint.weight_files import Export, Weight, check_folder, no_check
from zeroaccel.config.generic import convert_file_size_to_int
from zeroaccel.distributed.objects import all_objects
from zeroaccel.engine import shards
from zeroaccel.engine.placeholders import Placeholder
from zeroaccel.engine.unwrap import extract_model_from_parallel
from zeroaccel.errors import ConfigError, DistributedError
from zeroaccel.state import PartialState


@dataclass(frozen=True)
class Entry:
    """A tensor of a state dict.

    Attributes:
        names: all names of this tensor; tied weights have several.
        tensor: the live one.
        here: whether every rank has its whole value.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    here: bool = True

    def pieces(self, receivers: Sequence[int]) -> Iterator[torch.Tensor]:
        """See `shards.pieces`."""
        return shards.pieces(self.tensor, receivers, self.here)


def entries_of(module: torch.nn.Module) -> tuple[list[Entry], dict[str, Any]]:
    """What a module's state dict holds: its tensors, tied ones once, and what is no tensor by name.

    Parameters, frozen ones too, and persistent buffers. Collective where stage 3 has split the module.

    Raises:
        ConfigError: an entry is the empty placeholder of a split parameter, whose value cannot be known.
        DistributedError: the ranks have different models.
    """
    split = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if shards.is_split(parameter)
    }
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    names: dict[Any, list[str]] = {}
    tensors: dict[Any, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            others[name] = value
            continue
        if isinstance(value, Placeholder) or (split and value.numel() == 0 and id(value) not in own):
            value = _split_parameter(name, split)
        if value.is_meta:
            raise ConfigError(f"{name} is on the meta device, so it has no value to save")
        shards.refuse_expert_parallel(name, value)
        key = _identity(value)
        names.setdefault(key, []).append(name)
        tensors[key] = value
    found = [Entry(tuple(names[key]), tensors[key]) for key in names]
    return (_where(found) if split else found), others


def _split_parameter(name: str, split: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter that a state dict of the module's own making shows as its placeholder."""
    if name not in split:
        raise ConfigError(
            f"{name} has no value in the model's state dict: it stands for a parameter that ZeRO stage 3 has split,"
            " under a name that the model does not have, so its value cannot be collected"
        )
    return split[name]


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for tied tensors. Views of one buffer, as ZeRO's flat ones, are not."""
    return id(tensor) if shards.is_split(tensor) else same_weight(tensor)


def _where(entries: list[Entry]) -> list[Entry]:
    """Notes which tensors are whole on every rank."""
    listed = [(entry.names, tuple(shards.logical_shape(entry.tensor)), entry.tensor.dtype) for entry in entries]
    views = all_objects((str(listed), [shards.is_here(entry.tensor) for entry in entries]))
    if len({view[0] for view in views}) > 1:
        raise DistributedError("the ranks have different models, so their weights cannot be put together")
    everywhere = [all(flags) for flags in zip(*(view[1] for view in views), strict=True)]
    return [replace(entry, here=here) for entry, here in zip(entries, everywhere, strict=True)]


def get_state_dict(model: torch.nn.Module, unwrap: bool = True, copy: bool = True) -> dict[str, Any] | None:
    """The model's weights by name. Collective at stage 3.

    Args:
        model: what `prepare()` returned.
        unwrap: names as in the user's own module, of a model that is not a `DeepSpeedEngine`.
        copy: whether rank 0 gets a copy on the CPU, and not the live tensors.

    Returns:
        Under DeepSpeed on rank 0 a copy on the CPU, in which tied weights are one tensor. Other ranks copy nothing:
        they get None at stage 3, below it the live tensors.

    """
    module = extract_model_from_parallel(model, keep_torch_compile=False) if unwrap or copy else model
    if not copy:
        return module.state_dict()
    entries, others = entries_of(module)
    main = PartialState().is_main_process
    copies: dict[str, Any] = {}
    for entry in entries:
        value = _collected(entry)
        copies |= dict.fromkeys(entry.names, value)
    if not main:
        return None if any(shards.is_split(entry.tensor) for entry in entries) else module.state_dict()
    ordered = module.state_dict()
    for name in ordered:
        ordered[name] = copies[name] if name in copies else others[name]
    return ordered


def check_gathering_allowed(model: Any) -> None:
    """Refuses to put the whole model into rank 0's memory where nobody has asked for that.

    Raises:
        ConfigError: stage 3 without `stage3_gather_16bit_weights_on_model_save`.
    """
    allowed = getattr(model, "zero_gather_16bit_weights_on_model_save", None)
    if allowed is not None and model.zero_optimization_stage() == 3 and not allowed():
        raise ConfigError(
            "get_state_dict needs the whole model in rank 0's memory, which stage 3 does only if asked to: write"
            " stage3_gather_16bit_weights_on_model_save: true in the DeepSpeed config (zero3_save_16bit_model in the"
            " plugin or launch file), or use accelerator.save_model(), which needs no such memory"
        )


def _collected(entry: Entry) -> torch.Tensor | None:
    """A copy on rank 0's CPU."""
    if not PartialState().is_main_process:
        for _ in entry.pieces([0]):
            pass
        return None
    value = torch.empty(shards.logical_shape(entry.tensor), dtype=entry.tensor.dtype)
    flat, start = value.view(-1), 0
    for piece in entry.pieces([0]):
        flat[start : start + piece.numel()].copy_(piece)
        start += piece.numel()
    return value


def save_model(
    model: torch.nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    save_on_each_node: bool = False,
) -> None:
    """Writes the weights tensor by tensor. Collective at stage 3.

    A rank holds at most its own share and one parameter's part at a time, whatever the shards' size.

    Args:
        model: prepared or not, wrapped or not.
        save_directory: folder; is made. Weight files of an older save there are replaced once the new are complete.
        max_shard_size: of a file, as a number of bytes or a text such as "5GB".
        safe_serialization: safetensors, tied weights under their first name only; else `torch.save`.
        save_on_each_node: the first rank of every node writes, not only rank 0.

    Raises:
        ConfigError: the folder is a file, or a weight cannot be saved.
        CheckpointError: writing failed; at stage 3 on every rank.
    """
    folder, limit = check_folder(save_directory), convert_file_size_to_int(max_shard_size)
    entries, others = entries_of(extract_model_from_parallel(model, keep_torch_compile=False))
    if safe_serialization and others:
        raise ConfigError(
            f"{', '.join(others)}: no tensors, and safetensors holds nothing else; use safe_serialization=False"
        )
    collective = any(shards.is_split(entry.tensor) for entry in entries)
    state = PartialState()
    writes = state.is_local_main_process if save_on_each_node else state.is_main_process
    if not writes and not collective:
        return
    writers = [rank for rank, one in enumerate(all_objects(writes)) if one] if collective else [state.process_index]
    weights = [
        Weight(
            Layout(entry.names[0], entry.tensor.dtype, tuple(shards.logical_shape(entry.tensor))),
            partial(entry.pieces, writers),
            entry.names[1:],
        )
        for entry in entries
    ]

    def on_all_ranks(problem: Exception | None) -> None:
        together(partial(no_check, problem), "saving the model")

    check = on_all_ranks if collective else no_check
    Export(folder, weights, limit, safe_serialization, others, writes, check).run(f"model saved to {folder}")


def refuse_placeholders(value: Any, models: Iterable[torch.nn.Module]) -> None:
    """Refuses to save a state dict in which a split parameter is its empty placeholder.

    Args:
        value: what the script saves.
        models: the prepared ones.

    Raises:
        ConfigError: with the names.
    """
    split = {
        name
        for model in models
        for name, parameter in extract_model_from_parallel(model).named_parameters(remove_duplicate=False)
        if shards.is_split(parameter) and shards.logical_shape(parameter).numel()
    }
    if empty := list(_empty(value, split)):
        raise ConfigError(
            f"{', '.join(empty[:5])}{' and more' * (len(empty) > 5)} have no values: ZeRO stage 3 has split them, and"
            " a state dict shows placeholders. Save accelerator.get_state_dict(model), or call"
            " accelerator.save_model(model, folder)"
        )


def _empty(value: Any, split: set[str]) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if isinstance(inner, torch.Tensor):
            if isinstance(inner, Placeholder) or (inner.numel() == 0 and str(name).removeprefix("module.") in split):
                yield str(name)
        else:
            yield from _empty(inner, split)
