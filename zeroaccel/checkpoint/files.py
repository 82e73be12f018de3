"""`save` and `load`, as scripts import them: one object in one file."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)

# What arrays of NumPy, its random state for one, are pickled by, beyond what `torch.load(weights_only=True)` reads.
TORCH_SAFE_GLOBALS: list[Any] = [
    numpy.zeros(0).__reduce__()[0],
    numpy.ndarray,
    codecs.encode,
    numpy.dtype,
    type(numpy.dtype("uint32")),
]


def clean_state_dict_for_safetensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict as safetensors takes it: tied weights under their first name only, everything contiguous.

    Names that are left out are logged. Views of one buffer that are not the same weight all stay.
    """
    kept: dict[Any, str] = {}
    cleaned: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        identity = same_weight(tensor)
        if identity in kept:
            logger.warning(f"Removed shared tensor {name}: {kept[identity]}, which is the same, is saved")
            continue
        kept[identity] = name
        cleaned[name] = tensor.contiguous()
    return cleaned


def same_weight(tensor: torch.Tensor) -> Any:
    """Equal for tensors that show the same elements in the same way; an empty one equals itself only."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Writes an object on rank 0. A file of that name is replaced once the new one is complete.

    Args:
        obj: anything that `torch.save` takes.
        f: path or open file.
        save_on_each_node: write on the first rank of every node.
        safe_serialization: write a dictionary of tensors as safetensors.
    """
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if not isinstance(f, (str, os.PathLike)):
        _write(obj, f, safe_serialization)
        return
    with replacing(os.fspath(f)) as temporary:
        _write(obj, temporary, safe_serialization)


def _write(obj: Any, f: Any, safe: bool) -> None:
    if not safe:
        torch.save(obj, f)
        return
    import safetensors.torch

    tensors, about = clean_state_dict_for_safetensors(obj), {"format": "pt"}
    if isinstance(f, str):
        safetensors.torch.save_file(tensors, f, metadata=about)
    else:
        f.write(safetensors.torch.save(tensors, metadata=about))


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yields the name of a file that takes the place of `path` if the block ends well."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device, such as /dev/null, cannot be replaced
        yield path
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """What `save` wrote. By default only tensors, numbers and containers are read, and no code is run.

    Args:
        f: path or open file.
        map_location: device of the tensors.
        kwargs: of `torch.load`; `weights_only=False` runs what the file says.
    """
    with torch.serialization.safe_globals(TORCH_SAFE_GLOBALS):
        return torch.load(f, map_location=map_location, **{"weights_only": True, **kwargs})
