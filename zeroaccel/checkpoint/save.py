"""Saving: all ranks write their part of a new generation, then rank 0 makes it the one that counts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from zeroaccel.checkpoint import fragments, manifest
from zeroaccel.checkpoint.agreement import together
from zeroaccel.checkpoint.contents import Contents, numbers_by_parameter
from zeroaccel.checkpoint.manifest import File, Manifest, Model
from zeroaccel.checkpoint.progress import measured
from zeroaccel.checkpoint.safe_values import to_safe, write_safe
from zeroaccel.checkpoint.zero_to_fp32 import put_script
from zeroaccel.distributed.random_states import random_states
from zeroaccel.engine.masters import Share
from zeroaccel.state import PartialState

COMMON = "common.pt"


def rank_file(rank: int) -> str:
    """File of what each rank has of its own: random states, positions of loaders."""
    return f"rank_{rank:05}.pt"


def object_file(number: int) -> str:
    """File of a registered object, named as Accelerate names it."""
    return f"custom_checkpoint_{number}.pkl"


class Save:
    """One save. Collective: every rank makes it, and calls the same methods.

    Args:
        contents: what is saved.
        folder: of the checkpoint; one that is there stays loadable until the new one is complete.
        exclude_frozen_parameters: leave out parameters that need no gradient.
    """

    def __init__(self, contents: Contents, folder: str, exclude_frozen_parameters: bool = False) -> None:
        self._contents = contents
        self._folder = folder
        self._left_out = [sorted(share.frozen()) if exclude_frozen_parameters else [] for share in contents.shares]
        self._state = PartialState()
        self._doing = f"saving into {folder}"
        self._generation = ""

    def begin(self, check: Callable[[], None] | None = None) -> None:
        """Makes the folder.

        Args:
            check: what rank 0 looks for before; raises if the folder must not be used.

        Raises:
            CheckpointError, ConfigError: it cannot be used.
        """
        generation = together(partial(self._begin, check), self._doing)[0]
        self._generation = str(generation)

    def _begin(self, check: Callable[[], None] | None) -> str | None:
        if not self._state.is_main_process:
            return None
        if check is not None:
            check()
        return manifest.begin(self._folder)

    def write(self) -> None:
        """Writes everything, and commits it.

        Raises:
            CheckpointError: on every rank, if one could not write; the older checkpoint is as it was.
            UsageError: a registered object's state cannot be stored, or the gradients of an open window are final.
        """
        try:
            self._write()
        except BaseException:
            if self._state.is_main_process:
                with contextlib.suppress(Exception):
                    manifest.clean(self._folder)
            raise
        if self._state.is_main_process:
            with contextlib.suppress(OSError):  # the next save tries again
                manifest.clean(self._folder)

    def _write(self) -> None:
        rank, world_size, shares = self._state.process_index, self._state.num_processes, self._contents.shares
        sizes = [
            fragments.nbytes(share, left_out, rank, world_size)
            for share, left_out in zip(shares, self._left_out, strict=True)
        ]
        what = f"checkpoint saved to {self._folder}"
        with measured(what, sum(sizes) * world_size, self._state.is_main_process) as progress:
            written = together(partial(self._write_own, lambda done: progress(done * world_size)), self._doing)
            together(partial(self._complete, written), self._doing)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, self._generation, name)

    def _write_own(self, progress: Callable[[int], object]) -> tuple[list[File], list[dict[str, Any]]]:
        """This rank's files, and the numbers of its optimizer states by model."""
        rank, world_size = self._state.process_index, self._state.num_processes
        states = to_safe(random_states(self._state.device), "the random states")
        windows = [share.open_window() for share in self._contents.shares]
        own = {"random": states, "loaders": self._contents.loader_states(), "windows": windows}
        files = [self._safe(rank_file(rank), own)]
        numbers = []
        for number, (share, left_out) in enumerate(zip(self._contents.shares, self._left_out, strict=True)):
            numbers.append(numbers_by_parameter(share))
            name = fragments.file_name(number, rank)
            size, crc32 = fragments.write(self._path(name), share, left_out, rank, world_size, progress)
            files.append(File(name, size, crc32))
        return files, numbers

    def _safe(self, name: str, value: Any) -> File:
        return File(name, *write_safe(self._path(name), value))

    def _complete(self, written: list[tuple[list[File], list[dict[str, Any]]]]) -> None:
        """On rank 0: what all have in common, then the manifest."""
        if not self._state.is_main_process:
            return
        numbers: list[dict[str, Any]] = [{} for _ in self._contents.shares]
        for _, of_rank in reversed(written):
            for all_of_model, own in zip(numbers, of_rank, strict=True):
                all_of_model |= own
        files = [file for of_rank, _ in written for file in of_rank]
        files.append(self._safe(COMMON, self._contents.common(numbers)))
        files += [self._safe(object_file(n), state) for n, state in enumerate(self._contents.object_states())]
        models = [
            self._describe(number, share, left_out)
            for number, (share, left_out) in enumerate(zip(self._contents.shares, self._left_out, strict=True))
        ]
        put_script(self._folder)
        steps = [share.counters().get("global_steps") for share in self._contents.shares]
        manifest.commit(
            self._folder, Manifest(self._generation, self._state.num_processes, models, files, {"steps": steps})
        )

    def _describe(self, number: int, share: Share, left_out: list[str]) -> Model:
        return Model(
            kind=type(share.module).__name__,
            files=[fragments.file_name(number, rank) for rank in range(self._state.num_processes)],
            shapes={name: list(shape) for name, shape in share.shapes().items()},
            dtypes={name: str(dtype).removeprefix("torch.") for name, dtype in share.dtypes().items()},
            buffers={name: list(buffer.shape) for name, buffer in share.buffers().items()},
            frozen=sorted(share.frozen()),
            left_out=left_out,
            tied=share.tied(),
        )
