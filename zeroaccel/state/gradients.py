"""Where the gradient accumulation and the active loader stand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from zeroaccel.state.shared import Shared

if TYPE_CHECKING:
    from zeroaccel.config.options import GradientAccumulationPlugin


class GradientState(Shared):
    """Where the gradient accumulation and the active loader stand.

    Loaders publish here (`_add_dataloader`, `batches_drawn`, `_epoch_ended`), the accumulation window reads.

    Attributes:
        sync_gradients: whether this micro-batch closes its accumulation window.
        batches_drawn: batches that prepared loaders yielded so far, all loaders together.
        plugin_kwargs: the changed fields of the `GradientAccumulationPlugin`.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    plugin_kwargs: dict[str, Any]
    batches_drawn: int
    script_cuts: bool
    _sync_gradients: bool
    _references: list[weakref.ReferenceType[Any]]
    _epoch_end_hooks: list[Callable[[], None]]
    _joint_engines: list[tuple[weakref.ReferenceType[Any], bool]]

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self._sync_gradients = True
            self.script_cuts = False
            self.plugin_kwargs = {}
            self.batches_drawn = 0
            self._references = []
            self._epoch_end_hooks = []
            self._joint_engines = []
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    @property
    def num_steps(self) -> int:
        """Micro-batches in a full accumulation window."""
        return int(self.plugin_kwargs.get("num_steps", 1))

    @property
    def adjust_scheduler(self) -> bool:
        """Whether a scheduler counts the micro-batches between two optimizer steps."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", False))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether `accumulate()` closes the window at the end of the loader."""
        return bool(self.plugin_kwargs.get("sync_with_dataloader", True))

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch closes its window."""
        return self._sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        # The script cuts its windows itself from now on (docs/design.md).
        self.script_cuts = True
        self._sync_gradients = bool(value)

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        """What `transformers.Trainer` calls to cut its windows."""
        self.sync_gradients = sync_gradients

    def _mirror_sync_gradients(self, sync_gradients: bool) -> None:
        """The library's own count, shown to the script."""
        self._sync_gradients = sync_gradients

    @property
    def dataloader_references(self) -> list[Any]:
        """Loaders that are being iterated, innermost last; `[None]` outside of all."""
        return [None, *(loader for reference in self._references if (loader := reference()) is not None)]

    @property
    def active_dataloader(self) -> Any:
        """The innermost loader that is being iterated, or None."""
        # A loop, because every backward pass asks, and a generator costs more.
        for reference in reversed(self._references):
            if (loader := reference()) is not None:
                return loader
        return None

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the active loader's current batch is its last."""
        loader = self.active_dataloader
        return False if loader is None else bool(loader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """Real samples in the active loader's last global batch; 0 (or its size) if it is full, -1 if unknown."""
        loader = self.active_dataloader
        return -1 if loader is None else int(loader.remainder)

    @property
    def filler(self) -> bool:
        """Whether this rank ran out of batches and has its last one again, because others go on.

        `backward` counts it as zero and `gather_for_metrics` leaves it out; what a script counts by itself should too.
        """
        return any(getattr(reference(), "filler", False) for reference in self._references)

    @property
    def batch_sizes(self) -> list[int] | None:
        """Samples that each rank has in the active loader's batch, 0 for a filler; None if all have as many."""
        sizes = getattr(self.active_dataloader, "batch_sizes", None)
        return None if sizes is None or len(set(sizes)) == 1 else sizes

    def _add_engine(self, engine: Any, always: bool) -> None:
        """The model in `engine` needs all ranks: always, or while it is in training."""
        self._joint_engines = [each for each in self._joint_engines if each[0]() is not None]
        self._joint_engines.append((weakref.ref(engine), always))

    @property
    def _has_joint_engines(self) -> bool:
        return any(reference() is not None for reference, _ in self._joint_engines)

    def _ranks_work_together(self) -> bool:
        """Whether a model needs all ranks now."""
        engines = [(engine, always) for reference, always in self._joint_engines if (engine := reference()) is not None]
        return any(always or engine.module.training for engine, always in engines)  # an engine itself always is

    def _add_dataloader(self, dataloader: Any) -> None:
        self._references = [*self._references, weakref.ref(dataloader)]

    def _remove_dataloader(self, dataloader: Any) -> None:
        # The newest entry only: a loader can be iterated anew before an older iterator of it is let go.
        alive = [reference for reference in self._references if reference() is not None]
        for position in reversed(range(len(alive))):
            if alive[position]() is dataloader:
                del alive[position]
                break
        self._references = alive

    def _epoch_ended(self) -> None:
        for hook in self._epoch_end_hooks:
            hook()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        GradientState._shared_state.clear()
