"""The one file that makes a checkpoint: `manifest.json` names the generation that counts, and what is in it.

A save writes a new generation, a folder of its own, beside the one that counts. Once everything in it is on the disk
the manifest is replaced, in one step. Who reads sees the old generation or the new one, never a part of one, wherever a
run is killed; what a killed save has left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from zeroaccel.checkpoint.weight_files import sync_folder
from zeroaccel.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
_GENERATION = re.compile(r"generation-(\d{6,})")
_CHUNK = 2**24


@dataclass(frozen=True)
class File:
    """A file of a generation: its name there, its size in bytes and its CRC-32."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds of one model.

    Attributes:
        kind: class of the model.
        files: its fragments, one file a rank.
        shapes: of its parameters.
        dtypes: that the model computed with; trained masters are fp32 in the files.
        buffers: shapes of its persistent buffers.
        frozen: parameters that needed no gradient.
        left_out: those of them that were not saved.
        tied: further names of parameters: other name -> name.
    """

    kind: str
    files: list[str]
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    buffers: dict[str, list[int]]
    frozen: list[str]
    left_out: list[str]
    tied: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        generation: folder of all files.
        world_size: number of ranks that saved.
        models: in the order of `prepare()`.
        files: everything in the generation.
        facts: what is good to know, and nothing depends on.
    """

    generation: str
    world_size: int
    models: list[Model]
    files: list[File]
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    def path(self, folder: str, name: str) -> str:
        """Where a file of the generation is."""
        return os.path.join(folder, self.generation, name)


def read(folder: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    path = os.path.join(folder, NAME)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        content = document["content"]
        sound = document["crc32"] == zlib.crc32(_text(content))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no complete checkpoint: there is no {NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not sound:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer version of this library (format {content['format']})")
    content["models"] = [Model(**model) for model in content["models"]]
    content["files"] = [File(**entry) for entry in content["files"]]
    return Manifest(**content)


def _text(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def is_complete(folder: str) -> bool:
    """Whether a folder holds a checkpoint with all its files, in their full size."""
    try:
        manifest = read(folder)
        return all(os.path.getsize(manifest.path(folder, file.name)) == file.size for file in manifest.files)
    except (CheckpointError, OSError):
        return False


def begin(folder: str) -> str:
    """Makes the folder and in it an empty generation; removes what killed saves have left.

    Returns:
        Name of the generation.
    """
    os.makedirs(folder, exist_ok=True)
    clean(folder)
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := _GENERATION.fullmatch(name))]
    generation = f"generation-{max(numbers, default=0) + 1:06}"
    os.mkdir(os.path.join(folder, generation))
    return generation


def commit(folder: str, manifest: Manifest) -> None:
    """Makes the manifest's generation the one that counts.

    Raises:
        CheckpointError: a file is not there, or not in its full size.
    """
    for file in manifest.files:
        path = manifest.path(folder, file.name)
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found != file.size:
            raise CheckpointError(
                f"{path} has {'no' if found is None else found} bytes on rank 0 instead of {file.size}: all ranks must"
                " see one folder, also those of other nodes"
            )
    sync_folder(os.path.join(folder, manifest.generation))
    content = json.loads(json.dumps(asdict(manifest)))
    temporary = os.path.join(folder, f"{NAME}.tmp")
    with open(temporary, "w", encoding="utf-8") as target:
        json.dump({"crc32": zlib.crc32(_text(content)), "content": content}, target, indent=1)
        target.flush()
        os.fsync(target.fileno())
    sync_folder(folder)  # the generation's own name
    os.replace(temporary, os.path.join(folder, NAME))
    sync_folder(folder)


def has_leftovers(folder: str) -> bool:
    """Whether a save was begun here and never completed, and nothing complete is there."""
    names = os.listdir(folder)
    return NAME not in names and any(_GENERATION.fullmatch(name) for name in names)


def clean(folder: str) -> None:
    """Removes every generation that does not count, and a manifest that was not finished."""
    path = os.path.join(folder, NAME)
    kept = read(folder).generation if os.path.exists(path) else None
    if os.path.exists(f"{path}.tmp"):
        os.remove(f"{path}.tmp")
    for name in os.listdir(folder):
        if _GENERATION.fullmatch(name) and name != kept:
            shutil.rmtree(os.path.join(folder, name))


def remove(folder: str) -> None:
    """Removes a whole checkpoint; killed in between, it counts no more."""
    path = os.path.join(folder, NAME)
    if os.path.exists(path):
        os.remove(path)
        sync_folder(folder)
    shutil.rmtree(folder)


def checksum(path: str, progress: Callable[[int], object]) -> tuple[int, int]:
    """Size and CRC-32 of a file; `progress` is told the bytes read."""
    size, crc = 0, 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
            progress(len(chunk))
    return size, crc


def verify(folder: str, manifest: Manifest, names: list[str], progress: Callable[[int], object]) -> None:
    """Reads files and compares them with their checksums.

    Args:
        folder: of the checkpoint.
        manifest: its manifest.
        names: of the files.
        progress: is told the bytes read.

    Raises:
        CheckpointError: names every file that is missing or damaged.
    """
    problems = []
    for file in manifest.files:
        if file.name not in names:
            continue
        path = manifest.path(folder, file.name)
        try:
            size, crc = checksum(path, progress)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        if size != file.size:
            problems.append(f"{path} has {size} bytes instead of {file.size}")
        elif crc != file.crc32:
            problems.append(f"{path} is damaged: its checksum is wrong")
    if problems:
        raise CheckpointError("; ".join(problems))
