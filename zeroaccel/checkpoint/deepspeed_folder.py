"""The weights of a checkpoint that DeepSpeed's engine wrote, read without DeepSpeed and without running its pickles.

The fp32 masters of stages 1 to 3 lie in the ranks' optimizer files, in one flat tensor a param group: at stages 1 and 2
each rank has a stretch of it, at stage 3 a stretch of every parameter. Frozen parameters, buffers and, at stage 0, all
weights lie in the model files. Nothing is copied before it is used: the files are mapped into memory.
"""

from __future__ import annotations

import glob
import math
import os
import pickle
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from zeroaccel.checkpoint.tensor_file import Layout
from zeroaccel.checkpoint.weight_files import Weight
from zeroaccel.errors import CheckpointError, ConfigError


class _StandIn(int):
    """In the place of an object of DeepSpeed, of which nothing is needed but the number of an enumeration."""

    def __new__(cls, value: int = 0) -> _StandIn:
        return super().__new__(cls, value)


class DeepSpeedFolder:
    """A checkpoint of `engine.save_checkpoint`.

    Args:
        folder: that holds the tags, or the tag's own.
        tag: which one; default: the newest, named in the file `latest`.

    Raises:
        CheckpointError: files are missing or unreadable.
        ConfigError: there is no such tag.
    """

    def __init__(self, folder: str, tag: str | None = None) -> None:
        self.folder = _tag_folder(folder, tag)
        model_files = self._files("*model_states.pt")
        if not model_files:
            raise CheckpointError(f"{self.folder} holds no *model_states.pt, so it is no checkpoint of DeepSpeed")
        self._models = [_load(path) for path in model_files]
        self._model = self._models[0]
        self._optimizers = [_load(path)["optimizer_state_dict"] for path in self._files("*optim_states.pt")]
        self._refuse_what_is_not_zero()

    def _files(self, pattern: str) -> list[str]:
        """In order of rank."""
        found = glob.glob(os.path.join(glob.escape(self.folder), pattern))
        return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", os.path.basename(path))])

    def _refuse_what_is_not_zero(self) -> None:
        if int(self._model.get("mp_world_size") or 1) > 1 or self._model.get("num_experts"):
            raise ConfigError(
                f"{self.folder} is of a model with tensor, pipeline or expert parallelism, not of ZeRO only"
            )
        if not self._optimizers:
            return
        count = self._optimizers[0]["partition_count"]
        count = max(count) if isinstance(count, (list, tuple)) else count
        if int(count) != len(self._optimizers):
            raise CheckpointError(
                f"{self.folder} holds the optimizer files of {len(self._optimizers)} ranks, and {count} ranks wrote it"
            )

    @property
    def stage(self) -> int:
        """ZeRO stage that wrote it."""
        return int(self._optimizers[0]["zero_stage"]) if self._optimizers else 0

    def weights(self, exclude_frozen_parameters: bool = False) -> list[Weight]:
        """Parameters as fp32 masters, where there are some, and buffers; tied ones once.

        Raises:
            CheckpointError: the files hold another number of elements than the parameters.
        """
        trained = self._trained()
        frozen = {} if exclude_frozen_parameters else self._frozen()
        buffers = {name: self._model["module"][name] for name in self._model.get("buffer_names") or []}
        found = trained | frozen | {name: _whole(name, value) for name, value in buffers.items() if value is not None}
        shared = dict(self._model.get("shared_params") or {})
        aliases: dict[str, list[str]] = {}
        for other, name in shared.items():
            aliases.setdefault(name, []).append(other)
        return [
            Weight(weight.layout, weight.pieces, (*weight.aliases, *aliases.get(name, ())))
            for name, weight in found.items()
            if name not in shared
        ]

    # --- trained parameters ----------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Weight]:
        if self.stage == 0:
            return self._unsharded()
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in self._model["param_shapes"]]
        return self._trained_3(shapes) if self.stage == 3 else self._trained_12(shapes)

    def _unsharded(self) -> dict[str, Weight]:
        """Stage 0, or no optimizer: the model file has everything, in the precision of the model."""
        buffers = set(self._model.get("buffer_names") or [])
        placeholder = [
            name for name, value in self._model["module"].items() if value.numel() == 0 and name not in buffers
        ]
        if placeholder and len(self._models) > 1:
            raise CheckpointError(
                f"{self.folder} holds no values of {', '.join(placeholder[:5])}: stage 3 had split them"
            )
        named: dict[Any, str] = {}
        found = {}
        for name, value in self._model["module"].items():
            first = named.setdefault((value.data_ptr(), value.shape) if value.numel() else name, name)
            if name in buffers:
                continue
            if first == name:
                found[name] = _whole(name, value)
            else:
                found[first] = Weight(found[first].layout, found[first].pieces, (*found[first].aliases, name))
        return found

    def _trained_12(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, Weight]:
        found = {}
        paddings = self._optimizers[0].get("param_alignment_paddings")
        for number, group in enumerate(shapes):
            stretches = [state["single_partition_of_fp32_groups"][number] for state in self._optimizers]
            total, offset = sum(stretch.numel() for stretch in stretches), 0
            for position, (name, shape) in enumerate(group.items()):
                layout = Layout(name, torch.float32, shape)
                found[name] = Weight(layout, partial(_of_stretches, stretches, offset, math.prod(shape)))
                offset += math.prod(shape) + (paddings[number][position] if paddings else 0)
            if offset > total:
                raise CheckpointError(
                    f"{self.folder} holds {total} elements of param group {number}, which has {offset}"
                )
        return found

    def _trained_3(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, Weight]:
        ranks, found, offset = len(self._optimizers), {}, 0
        groups = [state["fp32_flat_groups"] for state in self._optimizers]
        for name, shape in [item for group in shapes for item in group.items()]:
            size = math.prod(shape)
            part = -(-size // ranks)
            found[name] = Weight(Layout(name, torch.float32, shape), partial(_of_parts, groups, offset, part, size))
            offset += part
        total = sum(tensor.numel() for tensor in groups[0])
        if offset > total:
            swapped = ": parameters or optimizer were on NVMe" if total == 0 else ""
            raise CheckpointError(f"{self.folder} holds {total} elements a rank of {offset}{swapped}")
        return found

    # --- frozen parameters --------------------------------------------------------------------------------------------

    def _frozen(self) -> dict[str, Weight]:
        if self.stage == 0:
            return {}
        shapes = self._model.get("frozen_param_shapes") or {}
        fragments = [model.get("frozen_param_fragments") or {} for model in self._models]
        if self.stage < 3:
            return self._frozen_12(set(shapes))
        found = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            parts = [[of_rank[name].reshape(-1)] for of_rank in fragments]
            layout = Layout(name, fragments[0][name].dtype, tuple(shape))
            found[name] = Weight(layout, partial(_of_parts, parts, 0, -(-size // len(parts)), size))
        return found

    def _frozen_12(self, listed: set[str]) -> dict[str, Weight]:
        """Whatever of the model's own weights is not trained; stage 1 does not list them."""
        trained = {name for group in self._model["param_shapes"] for name in group}
        apart = trained | set(self._model.get("buffer_names") or []) | set(self._model.get("shared_params") or {})
        fragments = self._model.get("frozen_param_fragments") or {}
        module = {name: value for name, value in self._model["module"].items() if isinstance(value, torch.Tensor)}
        frozen = {name: fragments.get(name, value) for name, value in module.items() if name not in apart}
        frozen |= {name: fragments[name] for name in listed - set(frozen)}
        return {name: _whole(name, value) for name, value in frozen.items()}


def _tag_folder(folder: str, tag: str | None) -> str:
    latest = os.path.join(folder, "latest")
    if tag is None and os.path.isfile(latest):
        with open(latest, encoding="utf-8") as file:
            tag = file.read().strip()
    chosen = folder if tag is None else os.path.join(folder, tag)
    if not os.path.isdir(chosen):
        there = sorted(name for name in os.listdir(folder)) if os.path.isdir(folder) else []
        raise ConfigError(f"there is no folder {chosen!r}" + (f", but {', '.join(there[:8])}" if there else ""))
    return chosen


def _load(path: str) -> dict[str, Any]:
    """Tensors stay in the file. No code of the file runs: only the stand-ins are made."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(_StandIn, name) for name in classes if name.startswith("deepspeed.")]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _whole(name: str, value: torch.Tensor) -> Weight:
    return Weight(Layout(name, value.dtype, tuple(value.shape)), lambda: iter([value.reshape(-1)]))


def _of_stretches(stretches: list[torch.Tensor], offset: int, size: int) -> Iterator[torch.Tensor]:
    """`size` elements from `offset` on of tensors that lie end to end."""
    for stretch in stretches:
        if 0 <= offset < stretch.numel() and size:
            piece = stretch[offset : offset + size]
            yield piece
            size -= piece.numel()
            offset = 0
        else:
            offset -= stretch.numel()


def _of_parts(groups: list[list[torch.Tensor]], offset: int, part: int, size: int) -> Iterator[torch.Tensor]:
    """The parts that all ranks have of one parameter, without what pads the last one."""
    for number, stretches in enumerate(groups):
        yield from _of_stretches(stretches, offset, max(0, min(part, size - number * part)))
