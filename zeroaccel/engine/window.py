"""The accumulation window of one engine: pure counting and decisions, no torch.

A window is what one real optimizer step covers. It consists of micro-batches: batches of the loader, blocks of
`accumulate()`, or, without a loader, whatever lies between two calls of `step()`. A micro-batch may have several
backward passes. docs/design.md holds the same rules as a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from zeroaccel.errors import UsageError


class Cutter(Enum):
    """Who decides where a window ends."""

    UNDECIDED = "the first step() outside accumulate() will tell"
    CONTEXT = "accumulate()"
    LIBRARY = "the library counts micro-batches"
    SCRIPT = "the script: every step() is real"


class Window:
    """Counts the micro-batches of the open window and answers what `step` and `zero_grad` mean now.

    Attributes:
        size: gradient accumulation steps, the micro-batches of a full window.
        micro_batches: micro-batches with a backward pass since the last real step.
        cutter: who cuts the open window.
        inside_context: whether an `accumulate()` block is running.
        steps_called: calls of `step()` so far, real or not.
        weight: sum of the open window's loss weights on this rank, None where its losses have none.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.micro_batches = 0
        self.steps_called = 0
        self.cutter = Cutter.UNDECIDED
        self._outside = Cutter.UNDECIDED
        self.inside_context = False
        self._closing = True
        self._begins = True  # the running block is the first of its window
        self._closed = True  # the last block that counted closed its window
        self._counts = False  # blocks name this window
        self._blocks = 0
        self._new_micro_batch = True
        self._batch: int | None = None
        self._rescalable = True
        self.weight: float | None = None

    def next_block(self, at_end: bool) -> bool:
        """Counts a block of `accumulate()`; whether it is the last of its window, as at the end of a loader."""
        self._counts = True
        self._blocks = 0 if at_end or self._blocks + 1 >= self.size else self._blocks + 1
        return self._blocks == 0

    def forget_blocks(self) -> None:
        """The next block of `accumulate()` begins a window."""
        self._blocks = 0

    def enter_context(self, closing: bool, named: bool = True) -> None:
        """An `accumulate()` block begins.

        Args:
            closing: it is the last of its window.
            named: it is of this model; else of another one, which this window follows unless it counts its own.
        """
        self.inside_context = True
        self._begins, self._closing = self._closed, closing
        if named or not self._counts:
            self._closed = closing
        self._new_micro_batch = True

    def leave_context(self) -> None:
        """The block ends; a `step()` right behind it still belongs to it."""
        self.inside_context = False

    def check_weight(self, weighted: bool) -> None:
        """A backward pass comes, of a loss with or without a weight.

        Raises:
            UsageError: the window's losses so far were of the other kind.
        """
        if self.micro_batches and weighted is not (self.weight is not None):
            raise UsageError(
                "backward(loss, weight=...) and backward(loss) are mixed in one accumulation window, which would then"
                " have two different means: give every loss of it a weight, or add the losses and call backward once"
            )

    def backward(self, batch: int | None, scaled: bool = True, weight: float | None = None) -> None:
        """A backward pass ran.

        Args:
            batch: number of the active loader's batch, None outside of loaders.
            scaled: whether the loss was divided by `size`; else the window is never rescaled.
            weight: what the loss was multiplied with instead.
        """
        if weight is not None:
            self.weight = (self.weight or 0.0) + weight
        if self.inside_context:
            self.cutter = Cutter.CONTEXT
        else:
            self.cutter = self._outside
            self._new_micro_batch |= batch is not None and batch != self._batch
        if self._new_micro_batch:
            self.micro_batches += 1
            self._new_micro_batch = False
        self._batch = batch
        self._rescalable &= scaled and weight is None

    def closes(self, script_cuts: bool = False, script_syncs: bool = True) -> bool:
        """Whether a `step()` now would be real. The first question outside `accumulate()` decides who cuts.

        Args:
            script_cuts: the script assigned `sync_gradients` itself.
            script_syncs: the value that it assigned.
        """
        if not self.micro_batches:
            return False
        cutter = self._cutter_of_step(script_cuts)
        if cutter is not Cutter.CONTEXT:
            self.cutter = self._outside = cutter
        return self._closed_by(cutter, script_syncs)

    def would_close(self, script_cuts: bool = False, script_syncs: bool = True) -> bool:
        """What `closes` would answer, without deciding anything."""
        return self.micro_batches > 0 and self._closed_by(self._cutter_of_step(script_cuts), script_syncs)

    def _closed_by(self, cutter: Cutter, script_syncs: bool) -> bool:
        if cutter is Cutter.CONTEXT:
            return self._closing
        if cutter is Cutter.SCRIPT:
            return script_syncs
        return self.micro_batches >= self.size

    def _cutter_of_step(self, script_cuts: bool) -> Cutter:
        if self.cutter is Cutter.CONTEXT:
            return Cutter.CONTEXT
        if script_cuts:
            return Cutter.SCRIPT
        if self._outside is Cutter.UNDECIDED:
            return Cutter.LIBRARY if self.micro_batches == 1 else Cutter.SCRIPT
        return self._outside

    def step(self, script_cuts: bool = False, script_syncs: bool = True) -> bool:
        """`optimizer.step()` was called: whether it is real. After a real one call `close()`."""
        self.steps_called += 1
        real = self.closes(script_cuts, script_syncs)
        if self._batch is None and not self.inside_context:
            self._new_micro_batch = True
        return real

    def close(self) -> None:
        """The window is over: stepped, or its gradients were thrown away."""
        self.micro_batches = 0
        self._new_micro_batch = True
        self._rescalable = True
        self.weight = None

    def state_dict(self) -> dict[str, Any]:
        """How far the open window is, as numbers and strings."""
        return {
            "micro_batches": self.micro_batches,
            "blocks": self._blocks,
            "steps_called": self.steps_called,
            "cutter": self.cutter.name,
            "outside": self._outside.name,
            "rescalable": self._rescalable,
            "weight": self.weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the window that `state_dict` described; the next backward pass is of a new micro-batch."""
        self.micro_batches, self.steps_called = state["micro_batches"], state["steps_called"]
        self.cutter, self._outside = Cutter[state["cutter"]], Cutter[state["outside"]]
        self._rescalable, self.weight = state["rescalable"], state["weight"]
        self._blocks = state.get("blocks", self.micro_batches)
        self._new_micro_batch, self._batch, self._closing, self._closed = True, None, False, False

    @property
    def clears(self) -> bool:
        """Whether `zero_grad()` now throws the accumulated gradients away; inside an open window it must not."""
        if self.micro_batches == 0 or self.cutter in (Cutter.UNDECIDED, Cutter.SCRIPT):
            return True
        if self.cutter is Cutter.CONTEXT:
            # Before the block's first backward pass there may be gradients that another model's pass left here.
            return self._begins if self._new_micro_batch else self._closing
        return self.micro_batches >= self.size

    @property
    def syncs(self) -> bool:
        """What `sync_gradients` shows outside `accumulate()` after a backward pass."""
        return self._outside is not Cutter.LIBRARY or self.micro_batches >= self.size

    @property
    def correction(self) -> float:
        """Factor for the accumulated gradients: a short window divides by the micro-batches that it really had.

        Windows that the script cuts keep the division by `size`, which token-weighted losses count on.
        """
        counted = self.cutter in (Cutter.CONTEXT, Cutter.LIBRARY)
        if counted and self._rescalable and 0 < self.micro_batches < self.size:
            return self.size / self.micro_batches
        return 1.0

    @property
    def forgotten(self) -> bool:
        """Whether a full window of gradients waits for a `step()` that was never called."""
        return self.steps_called == 0 and self.micro_batches >= self.size


@contextmanager
def micro_batch(windows: Sequence[Window], named: Sequence[Window], at_end: bool, state: Any) -> Iterator[None]:
    """One block of `accumulate()`, for all engines.

    Args:
        windows: of all engines.
        named: those of the models that the block names, which count it; none: all do.
        at_end: the block closes whatever the count, as the loader ends.
        state: the `GradientState`, which shows whether the block closes.
    """
    closing = [window.next_block(at_end) for window in named or windows]
    counted = {id(window): closes for window, closes in zip(named or windows, closing, strict=True)}
    if closing:
        state._mirror_sync_gradients(closing[0])
    for window in windows:
        window.enter_context(counted.get(id(window), closing[0]), named=id(window) in counted)
    try:
        yield
    finally:
        for window in windows:
            window.leave_context()
