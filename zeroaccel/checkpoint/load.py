"""Loading: verified by all ranks together, compared with the run, and only then copied into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroaccel.checkpoint import manifest
from zeroaccel.checkpoint.agreement import together
from zeroaccel.checkpoint.contents import Contents
from zeroaccel.checkpoint.fragments import Fragments
from zeroaccel.checkpoint.manifest import Manifest, Model
from zeroaccel.checkpoint.progress import measured
from zeroaccel.checkpoint.safe_values import read_safe
from zeroaccel.checkpoint.save import COMMON, object_file, rank_file
from zeroaccel.distributed.random_states import set_random_states
from zeroaccel.engine.masters import BUFFER, STATE, WEIGHT, Shard, Share
from zeroaccel.errors import CheckpointError
from zeroaccel.logging import library_logger
from zeroaccel.state import PartialState

logger = library_logger(__name__)


@dataclass(frozen=True)
class What:
    """What shall be loaded.

    Attributes:
        weights: numbers of the models whose weights are loaded; None: all.
        optimizer: optimizer states and param groups.
        schedulers: learning-rate schedulers.
        rest: counters, loss scale, random states, positions of loaders, registered objects, gradients
            of an open window.
        strict: every parameter of the run must be in the checkpoint, and the reverse.
        options: of `torch.load`, for registered objects.
    """

    weights: Collection[int] | None = None
    optimizer: bool = True
    schedulers: bool = True
    rest: bool = True
    strict: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def load(contents: Contents, folder: str, what: What) -> int:
    """Brings a run to where it was saved. Collective.

    Args:
        contents: the run; any number of ranks, any ZeRO stage, offload and precision.
        folder: of the checkpoint.
        what: shall be loaded.

    Returns:
        Blocks of `accumulate()` in the window that was open.

    Raises:
        CheckpointError: damaged, or of another model; nothing of the run was changed.
    """
    return _Load(contents, folder, what).run()


class _Load:
    def __init__(self, contents: Contents, folder: str, what: What) -> None:
        self._contents = contents
        self._folder = folder
        self._what = what
        self._state = PartialState()
        self._doing = f"loading {folder}"

    def run(self) -> int:
        first = self._state.is_main_process
        self._found: Manifest = together(lambda: manifest.read(self._folder) if first else None, self._doing)[0]  # type: ignore[assignment]
        with measured(f"checkpoint loaded from {self._folder}", self._found.size, first) as progress:
            # All ranks do as much as this one, and read everything twice: to verify it, to load it.
            self._progress: Callable[[int], None] = lambda done: progress(done * self._state.num_processes // 2)
            together(self._verify, self._doing)
            together(self._open, self._doing)
            self._load_models()
        together(self._restore, self._doing)
        return int(self._common["step"])

    def _verify(self) -> None:
        """Each rank reads its part of the files."""
        files = sorted(self._found.files, key=lambda file: -file.size)
        own = [file.name for file in files[self._state.process_index :: self._state.num_processes]]
        manifest.verify(self._folder, self._found, own, self._progress)

    def _open(self) -> None:
        """Reads what is small, and compares everything with the run."""
        self._common = read_safe(self._path(COMMON))
        models, shares = self._found.models, self._contents.shares
        if len(models) != len(shares):
            raise CheckpointError(
                f"the checkpoint holds {len(models)} models, and {len(shares)} are prepared: prepare the same, in the"
                " same order"
            )
        self._fragments = [Fragments([self._path(name) for name in model.files]) for model in models]
        problems: list[str] = []
        for number, share in enumerate(shares):
            if self._takes_weights(number):
                problems += self._compare_tensors(models[number], share, self._fragments[number])
            if self._what.optimizer:
                problems += self._compare_optimizer(self._common["models"][number], share)
            if self._what.rest:
                problems += self._compare_window(self._common["models"][number], share)
        problems += self._compare_counts()
        if problems:
            raise CheckpointError("it does not fit:" + "".join(f"\n  {problem}" for problem in problems))

    def _path(self, name: str) -> str:
        return self._found.path(self._folder, name)

    def _takes_weights(self, number: int) -> bool:
        return self._what.weights is None or number in self._what.weights

    # --- does it fit --------------------------------------------------------------------------------------------

    def _compare_tensors(self, model: Model, share: Share, stored: Fragments) -> list[str]:
        shapes = share.shapes() | {name: tuple(buffer.shape) for name, buffer in share.buffers().items()}
        saved = {name: tuple(shape) for name, shape in (model.shapes | model.buffers).items()}
        problems = [
            f"{name}: its shape is {saved[name]} in the checkpoint and {shape} in {model.kind}"
            for name, shape in shapes.items()
            if name in saved and saved[name] != shape
        ]
        wanted = [name for name, shape in saved.items() if math.prod(shape) and name not in model.left_out]
        if lacking := [name for name in wanted if not stored.has(WEIGHT, name) and not stored.has(BUFFER, name)]:
            problems.append(f"the checkpoint's files lack {_some(lacking)}")
        if not self._what.strict:
            return problems
        if missing := [name for name in shapes if name not in saved]:
            problems.append(f"the checkpoint lacks {_some(missing)}")
        if unexpected := [name for name in saved if name not in shapes]:
            problems.append(f"{type(share.module).__name__} lacks {_some(unexpected)}")
        lost = set(model.left_out) - share.frozen()
        if lost:
            problems.append(f"{_some(sorted(lost))} was frozen, so it was left out, and is trained now")
        return problems

    def _compare_optimizer(self, saved: dict[str, Any], share: Share) -> list[str]:
        groups = saved["groups"]
        remedy = "to take over the weights only, write load_state(..., load_module_only=True)"
        if len(groups) != len(share.groups):
            return [f"the optimizer has {len(share.groups)} param groups, and the checkpoint {len(groups)}; {remedy}"]
        problems = []
        for number, (group, own) in enumerate(zip(groups, share.groups, strict=True)):
            if group["rule"] != own.rule:
                problems.append(f"the optimizer was {group['rule']} and is {own.rule} now; {remedy}")
            elif different := sorted(set(group["names"]) ^ set(own.names)):
                problems.append(f"param group {number} differs in {_some(different)}; {remedy}")
        return problems

    def _compare_window(self, saved: dict[str, Any], share: Share) -> list[str]:
        then = f"{self._found.world_size} ranks ({saved['layout']})"
        now = f"{self._state.num_processes} ranks ({share.gradient_layout()})"
        if not saved["open"] or then == now:
            return []
        return [
            f"{saved['open']} micro-batches wait for their optimizer step, with gradients as they lie on {then}, and"
            f" this run has {now}: resume in the same way, or save where"
            " accelerator.sync_gradients is True, after optimizer.step()"
        ]

    def _compare_counts(self) -> list[str]:
        problems = []
        if self._what.schedulers and len(self._common["schedulers"]) != len(self._contents.schedulers):
            problems.append(
                f"the checkpoint holds {len(self._common['schedulers'])} schedulers, and"
                f" {len(self._contents.schedulers)} are prepared"
            )
        saved = sum(file.name.startswith("custom_checkpoint_") for file in self._found.files)
        if self._what.rest and saved != len(self._contents.objects):
            registered = ", ".join(type(one).__name__ for one in self._contents.objects) or "none"
            problems.append(
                f"the checkpoint holds {saved} registered objects, and {len(self._contents.objects)} are registered"
                f" ({registered}): call register_for_checkpointing with the same, in the same order"
            )
        return problems

    # --- the models ---------------------------------------------------------------------------------------------

    def _load_models(self) -> None:
        with ExitStack() as stack:
            for share in self._contents.shares:
                share.drop_gradients()
                stack.enter_context(share.at_rest())
            together(self._fill, self._doing)
            for number, share in enumerate(self._contents.shares):
                if self._takes_weights(number):
                    share.refresh()

    def _fill(self) -> None:
        for number, share in enumerate(self._contents.shares):
            saved = self._common["models"][number]
            for shard in share.shards():
                self._fill_shard(shard, self._fragments[number], self._takes_weights(number), saved["numbers"])
            if self._what.optimizer:
                for group, own in zip(saved["groups"], share.groups, strict=True):
                    own.set(group["settings"])
            if self._what.rest:
                share.set_counters(saved["counters"])
            if self._takes_weights(number):
                share.set_extra_state(saved["extra"])

    def _fill_shard(
        self, shard: Shard, stored: Fragments, with_weights: bool, numbers: dict[str, dict[str, Any]]
    ) -> None:
        with_state = self._what.optimizer and shard.group is not None
        names = [part.name for part in shard.slices]
        state = (_states(stored, names), _furthest(numbers, names)) if with_state else None
        if not with_weights and not with_state:
            return
        with torch.no_grad(), shard.opened(write=True, state=state) as tensors:
            for kind, tensor in tensors.items():
                if with_state if kind.startswith(STATE) else with_weights:
                    _fill_tensor(shard, kind, tensor, stored)
                    self._progress(tensor.nbytes)

    # --- the rest -----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if self._what.schedulers:
            for scheduler, state in zip(self._contents.schedulers, self._common["schedulers"], strict=True):
                scheduler.load_state_dict(state)
        if not self._what.rest:
            return
        for number, one in enumerate(self._contents.objects):
            one.load_state_dict(read_safe(self._path(object_file(number)), **self._what.options))
        self._restore_own()

    def _restore_own(self) -> None:
        """What each rank has kept for itself; ranks that were not there before have nothing of that kind."""
        rank, saved = self._state.process_index, self._found.world_size
        own = read_safe(self._path(rank_file(rank if rank < saved else 0)))
        if rank < saved:
            set_random_states(own["random"], self._state.device)
        elif rank == saved:
            logger.warning(f"{saved} ranks saved: rank {saved} and those above go on with their own random states")
        for share, window in zip(self._contents.shares, own["windows"], strict=True):
            if window is not None:  # then the number of ranks is the same
                share.set_open_window(window)
        same = saved == self._state.num_processes
        positions = own["loaders"] if same else read_safe(self._path(rank_file(0)))["loaders"]
        if rank == 0 and len(positions) != len(self._contents.loaders):
            logger.warning(f"{len(positions)} loaders were saved, {len(self._contents.loaders)} are prepared: in order")
        for loader, position in zip(self._contents.loaders, positions, strict=False):
            if position is not None and hasattr(loader, "load_state_dict"):
                loader.load_state_dict(position)


def _fill_tensor(shard: Shard, kind: str, tensor: torch.Tensor, stored: Fragments) -> None:
    """Every slice that is in the checkpoint; states that a parameter did not have yet stay as they are."""
    for part in shard.slices:
        if part.count and stored.has(kind, part.name):
            stored.read(kind, part.name, part.start, tensor.narrow(0, part.offset, part.count))


def _states(stored: Fragments, names: Iterable[str]) -> list[str]:
    """Optimizer states that one of the parameters has."""
    return sorted({name for name in stored.states() if any(stored.has(STATE + name, one) for one in names)})


def _furthest(numbers: dict[str, dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Numbers for parameters that share one state: those of the one that has made most steps."""
    found = [numbers[name] for name in names if name in numbers]
    return max(found, key=lambda one: float(one.get("step", 0)), default={})


def _some(names: Collection[str]) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
