"""Weights as files that other libraries read: safetensors or PyTorch's pickle, in shards with an index.

Each tensor is written as it comes, whatever the size of the shards. All files are complete before the first one takes
the place of an older one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from zeroaccel.checkpoint.progress import measured
from zeroaccel.checkpoint.tensor_file import Layout, TensorFile, in_file_order, mapped
from zeroaccel.config.constants import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from zeroaccel.errors import CheckpointError, ConfigError

Result = TypeVar("Result")

_CHECK_EVERY = 2**28  # bytes between two questions whether the writing still goes well


@dataclass(frozen=True)
class Weight:
    """One tensor on its way into a file.

    Attributes:
        layout: name, dtype and shape in the file.
        pieces: its flat value in consecutive pieces; on ranks that do not write, nothing.
        aliases: further names of the same tensor.
    """

    layout: Layout
    pieces: Callable[[], Iterator[torch.Tensor]]
    aliases: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""
        return self.layout.dtype


def no_check(problem: Exception | None) -> None:
    """Raises the problem, where nobody else has to know of it."""
    if problem is not None:
        raise problem


@dataclass
class Export:
    """Writes all weights into a folder.

    Attributes:
        folder: is made if need be.
        weights: in the order in which they are put into shards.
        max_shard_size: bytes of a shard; a larger tensor gets a shard of its own.
        safe: safetensors instead of `torch.save`.
        extra: what is no tensor, for `torch.save`.
        writes: whether this rank writes the files; the others only take part in `pieces`.
        check: is asked now and then, and at the end, with this rank's problem or None; raises if any rank has one.
    """

    folder: str
    weights: Sequence[Weight]
    max_shard_size: int
    safe: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    writes: bool = True
    check: Callable[[Exception | None], None] = no_check
    _problem: Exception | None = None
    _unchecked: int = 0

    def run(self, what: str) -> list[str]:
        """Writes everything.

        Args:
            what: name in progress bar and log.

        Returns:
            Names of the files with weights.

        Raises:
            CheckpointError: something cannot be written, with the reason; older files are still there.
        """
        shards = _cut(self.weights, self.max_shard_size)
        names = _shard_names(len(shards), SAFE_WEIGHTS_NAME if self.safe else WEIGHTS_NAME)
        with measured(what, sum(weight.layout.nbytes for weight in self.weights), self.writes) as progress:
            self._try(self._begin)
            for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
                self._write(name, in_file_order(shard), self.extra if number == 0 else {}, progress)
            self._ask()
            self._try(self._commit, names, shards)
            self._ask()
        return names

    # --- trouble on a rank that writes must not leave the others waiting -------------------------------------------

    def _try(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """The function's result; None on a rank that does not write, and once something failed."""
        if not self.writes or self._problem is not None:
            return None
        try:
            return function(*arguments)
        except (OSError, CheckpointError) as error:
            self._problem = CheckpointError(f"{self.folder}: the weights cannot be written: {error}")
            self._problem.__cause__ = error
            return None

    def _ask(self) -> None:
        self._unchecked = 0
        try:
            self.check(self._problem)
        except Exception:
            if self.writes:
                self._clean()
            raise

    # --- one shard -------------------------------------------------------------------------------------------------

    def _write(self, name: str, shard: Sequence[Weight], extra: dict[str, Any], progress: Callable[[int], Any]) -> None:
        file = self._try(TensorFile, self._temporary(name), [weight.layout for weight in shard])
        try:
            for weight in shard:
                for piece in weight.pieces():
                    if file is not None:
                        self._try(file.write, piece, weight.dtype)
                progress(weight.layout.nbytes)
                self._unchecked += weight.layout.nbytes
                if self._unchecked >= _CHECK_EVERY:
                    self._ask()
            if file is not None:
                self._try(file.close)
        finally:
            if file is not None:
                file.abandon()
        if file is not None and not self.safe:
            self._try(self._pickle, name, file.starts, shard, extra)

    def _pickle(self, name: str, starts: dict[str, int], shard: Sequence[Weight], extra: dict[str, Any]) -> None:
        """`torch.save` of what was written: the memory is that of the file, not this process's."""
        spooled, state = self._temporary(name), dict(extra)
        for weight in shard:
            value = mapped(spooled, starts[weight.layout.name], weight.layout)
            state.update(dict.fromkeys((weight.layout.name, *weight.aliases), value))
        with open(f"{spooled}.pickle", "wb") as target:
            torch.save(state, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(f"{spooled}.pickle", spooled)

    # --- the folder --------------------------------------------------------------------------------------------------

    def _temporary(self, name: str) -> str:
        return os.path.join(self.folder, f".{name}.tmp")

    def _kind(self) -> tuple[str, str]:
        stem, suffix = (SAFE_WEIGHTS_NAME if self.safe else WEIGHTS_NAME).split(".")
        return re.escape(stem), re.escape(suffix)

    def _begin(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self._clean()

    def _clean(self) -> None:
        """Removes what a writing that failed, or was killed, has left."""
        stem, suffix = self._kind()
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else []:
            if re.fullmatch(rf"\.{stem}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?\.tmp(\.pickle)?", name):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(self.folder, name))

    def _commit(self, names: Sequence[str], shards: Sequence[Sequence[Weight]]) -> None:
        index = f"{SAFE_WEIGHTS_NAME if self.safe else WEIGHTS_NAME}.index.json"
        new = [*names, index] if len(names) > 1 else list(names)
        if len(names) > 1:
            with open(self._temporary(index), "w", encoding="utf-8") as file:
                json.dump(self._index(names, shards), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
        for name in new:
            os.replace(self._temporary(name), os.path.join(self.folder, name))
        stem, suffix = self._kind()
        for name in os.listdir(self.folder):
            older = re.fullmatch(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?", name)
            if older and name not in new:
                os.remove(os.path.join(self.folder, name))
        sync_folder(self.folder)

    def _index(self, names: Sequence[str], shards: Sequence[Sequence[Weight]]) -> dict[str, Any]:
        where = {
            key: name
            for name, shard in zip(names, shards, strict=True)
            for weight in shard
            for key in (weight.layout.name, *(() if self.safe else weight.aliases))
        }
        where |= dict.fromkeys(self.extra, names[0])
        size = sum(weight.layout.nbytes for weight in self.weights)
        return {"metadata": {"total_size": size}, "weight_map": where}


def sync_folder(folder: str) -> None:
    """Has the folder's list of names on the disk when it returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cut(weights: Sequence[Weight], limit: int) -> list[list[Weight]]:
    """Shards of at most `limit` bytes, in order; at least one."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + weight.layout.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.layout.nbytes
    return shards


def _shard_names(count: int, name: str) -> list[str]:
    stem, suffix = name.split(".")
    return [name] if count == 1 else [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]


def check_folder(folder: str | os.PathLike[str]) -> str:
    """The folder's path.

    Raises:
        ConfigError: it is a file.
    """
    path = os.fspath(folder)
    if os.path.isfile(path):
        raise ConfigError(f"{path!r} is a file: name the folder that the weights shall go into")
    return path
