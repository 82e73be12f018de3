"""Weights from files into a model, one tensor at a time: plain models, and those that ZeRO runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from zeroaccel.checkpoint.agreement import together
from zeroaccel.config.constants import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from zeroaccel.distributed.objects import broadcast_object_list
from zeroaccel.engine import owners, shards
from zeroaccel.engine.masters import STATE, Share
from zeroaccel.engine.modules import find_tied_parameters, retie_parameters
from zeroaccel.engine.unwrap import extract_model_from_parallel
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)

_EXTRA_STATE = "_extra_state"  # PyTorch's name for what `get_extra_state` of a module gives


def load_state_dict(checkpoint_file: str | os.PathLike[str], device_map: Any = None) -> dict[str, Any]:
    """Tensors of a file of weights by name, on the CPU; they are read from the file when they are used.

    Args:
        checkpoint_file: safetensors, or what `torch.save` wrote.
        device_map: a device for all of them, as `{"": device}`.

    Raises:
        ConfigError: the file is neither.
        UnsupportedError: a device map with several devices.
    """
    path = os.fspath(checkpoint_file)
    device = _one_device(device_map)
    try:
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, framework="pt", device=str(device)) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpickled(path, device)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} holds no weights that can be read: {error}") from error


def _unpickled(path: str, device: Any) -> dict[str, Any]:
    options = {"map_location": device, "weights_only": True}
    try:
        return torch.load(path, mmap=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # of before PyTorch 1.6, when files were no archives
        return torch.load(path, **options)  # type: ignore[no-any-return]


def _one_device(device_map: Mapping[str, Any] | None) -> torch.device:
    if device_map is None:
        return torch.device("cpu")
    if list(device_map) != [""] or device_map[""] == "disk":
        raise UnsupportedError(
            f"device_map={dict(device_map)} spreads a model over devices for inference; this library splits models with"
            " ZeRO: leave device_map out"
        )
    return torch.device(device_map[""])


def weight_files(checkpoint: str | os.PathLike[str]) -> list[str]:
    """Files with the weights of a checkpoint.

    Args:
        checkpoint: a file of weights, an index of shards, or a folder with one of them; safetensors come first.

    Raises:
        ConfigError: there are none, or several indices.
    """
    path = os.fspath(checkpoint)
    if os.path.isfile(path):
        return _listed(path) if path.endswith(".json") else [path]
    if not os.path.isdir(path):
        raise ConfigError(f"there is no file or folder {path!r} with weights")
    known = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    there = os.listdir(path)
    found = [name for name in known if name in there] or [name for name in there if name.endswith(".index.json")]
    if not found or (len(found) > 1 and found[0] not in known):
        raise ConfigError(
            f"{path!r} holds {', '.join(sorted(found)) or 'no weights'}: name a file, or a folder with one of"
            f" {', '.join(known)}"
        )
    chosen = os.path.join(path, found[0])
    return _listed(chosen) if chosen.endswith(".json") else [chosen]


def _listed(index: str) -> list[str]:
    with open(index, encoding="utf-8") as file:
        document = json.load(file)
    return [
        os.path.join(os.path.dirname(index), name)
        for name in sorted(set(document.get("weight_map", document).values()))
    ]


def load_checkpoint_in_model(
    model: torch.nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: list[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Loads weights into a model, also into one that ZeRO runs: its fp32 masters get what the files hold.

    Collective for a model that was prepared under DeepSpeed. An optimizer keeps its state.

    Args:
        model: prepared or not, wrapped or not; built under stage 3's `zero.Init` or on the meta device, too.
        checkpoint: a file of weights, an index of shards, or a folder with one of them.
        device_map: None, or one device as `{"": device}`, to which the model is moved.
        offload_folder, dtype, offload_state_dict, offload_buffers, keep_in_fp32_modules, offload_8bit_bnb,
            full_state_dict: of models spread over devices; without effect, as in Accelerate without a device map.
        strict: every tensor of the model must be in the files, and the reverse.
        broadcast_from_rank0: only rank 0 reads; for a model that is not prepared yet.

    Raises:
        ConfigError: no such files, other shapes, or with `strict` other names.
        UnsupportedError: a device map with several devices.
    """
    device = None if device_map is None else _one_device(device_map)
    module = extract_model_from_parallel(model, keep_torch_compile=False)
    if broadcast_from_rank0 and owners.share_of(module) is not None:
        raise UnsupportedError("broadcast_from_rank0 works before prepare(): load first, or let every rank read")
    reads = not broadcast_from_rank0 or PartialState().is_main_process
    stored: dict[str, Any] = {}
    for path in weight_files(checkpoint) if reads else []:
        stored |= load_state_dict(path)
    if broadcast_from_rank0:
        stored = _from_rank_0(stored)
    load_tensors(module, stored, strict, os.fspath(checkpoint))
    if device is not None:
        model.to(device)


def load_tensors(module: torch.nn.Module, stored: Mapping[str, Any], strict: bool, where: str) -> None:
    """Loads a state dict into a module that may be running under ZeRO; see `load_checkpoint_in_model`.

    Args:
        module: the user's own.
        stored: the tensors.
        strict: see there.
        where: they come from, for errors.
    """
    share = owners.share_of(module)
    wanted = _check(module, stored, strict, where)
    extra = {name: wanted.pop(name) for name in list(wanted) if name.endswith(_EXTRA_STATE)}
    if share is not None:
        _into_share(share, wanted)
    else:
        _into_module(module, wanted)
    for name, value in extra.items():
        module.get_submodule(name.removesuffix(_EXTRA_STATE).rstrip(".")).set_extra_state(value)


def _from_rank_0(stored: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 has read, on every rank."""
    state = PartialState()
    if state.num_processes == 1:
        return stored
    (layouts,) = broadcast_object_list([{name: (tuple(v.shape), v.dtype) for name, v in stored.items()}])
    return {
        name: _broadcast(stored[name] if state.is_main_process else torch.empty(shape, dtype=dtype), state.device)
        for name, (shape, dtype) in layouts.items()
    }


def _broadcast(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    sent = value.to(device).contiguous()
    if sent.numel():
        torch.distributed.broadcast(sent.view(-1).view(torch.uint8), src=0)
    return sent.cpu()


def _check(module: torch.nn.Module, stored: Mapping[str, Any], strict: bool, where: str) -> dict[str, Any]:
    """What of the files goes into the model, by the model's names."""
    own = module.state_dict(keep_vars=True)
    tied = {name: names for names in find_tied_parameters(module) for name in names}
    problems, wanted = [], {}
    for name, tensor in own.items():
        source = next((one for one in [name, *tied.get(name, ())] if one in stored), None)
        if source is None:
            if strict:
                problems.append(f"{name} is missing")
            continue
        shape = shards.logical_shape(tensor) if isinstance(tensor, torch.Tensor) else None
        if shape is not None and stored[source].shape != shape:
            problems.append(f"{name} has shape {tuple(stored[source].shape)} there and {tuple(shape)} in the model")
        wanted[name] = stored[source]
    if unexpected := [name for name in stored if name not in own]:
        if strict:
            problems += [f"the model has no {name}" for name in unexpected]
        else:
            logger.warning(f"{where} holds {len(unexpected)} tensors that the model does not have: {unexpected[:8]}")
    if problems:
        raise ConfigError.join([f"{where}: {problem}" for problem in problems])
    return wanted


def _into_share(share: Share, wanted: Mapping[str, Any]) -> None:
    """Every rank fills its own part of masters, frozen weights and buffers, then the model follows."""
    share.drop_gradients()
    with share.at_rest():
        together(lambda: _fill(share, wanted), "loading weights")
        share.refresh()


def _fill(share: Share, wanted: Mapping[str, Any]) -> None:
    for shard in share.shards():
        parts = [part for part in shard.slices if part.count and part.name in wanted]
        if not parts:
            continue
        with torch.no_grad(), shard.opened(write=True) as tensors:
            for kind, tensor in tensors.items():
                for part in parts if not kind.startswith(STATE) else ():
                    source = wanted[part.name].reshape(-1)[part.start : part.start + part.count]
                    tensor.narrow(0, part.offset, part.count).copy_(source)


def _into_module(module: torch.nn.Module, wanted: Mapping[str, Any]) -> None:
    ties = find_tied_parameters(module)
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in wanted.items():
            target = own[name]
            if target.is_meta:
                _replace(module, name, target, value)
            elif shards.is_split(target):
                shards.put(target, value)
            else:
                target.copy_(value)
    retie_parameters(module, ties)


def _replace(module: torch.nn.Module, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner, made = module.get_submodule(path), value.to(target.dtype).clone()
    if isinstance(target, torch.nn.Parameter):
        owner._parameters[last] = torch.nn.Parameter(made, requires_grad=target.requires_grad)
    else:
        owner._buffers[last] = made
