"""Ranks with different numbers of batches: all of them take part until the last one is through.

Before each batch every rank tells the others how many samples it has in the one after it, in an asynchronous exchange
that is over by the time it is asked for. A rank that ran out gets its last batch again, a filler: `backward` counts it
as zero and `gather_for_metrics` leaves it out, but the rank is there for what the others need it for.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from zeroaccel.data_loader.parts import samplers_of
from zeroaccel.data_loader.sharding import BatchSamplerShard
from zeroaccel.distributed.nested import ignorant_find_batch_size, send_to_device
from zeroaccel.distributed.objects import broadcast_object_list
from zeroaccel.errors import DistributedError
from zeroaccel.state import GradientState, PartialState
from zeroaccel.state.meeting import attend

END = object()
_ROUNDS = 2**32  # more than any epoch has


@dataclass(frozen=True)
class Round:
    """One batch on every rank.

    Attributes:
        batch: this rank's.
        last: whether no rank has another one.
        sizes: samples that each rank has, 0 for a filler; None where ranks go on by themselves.
        filler: whether this rank has none.
    """

    batch: Any
    last: bool
    sizes: list[int] | None = None
    filler: bool = False


class _Exchange:
    """How many samples each rank has in the batches to come. Every rank must announce equally many rounds."""

    _loops: ClassVar[int] = 0
    _groups: ClassVar[dict[Any, Any]] = {}

    def __init__(self) -> None:
        self._state = PartialState()
        self._group = self._cpu_group()
        self._announced: deque[tuple[list[torch.Tensor], Any, int]] = deque()
        _Exchange._loops += 1
        self._tag = _Exchange._loops * _ROUNDS

    @classmethod
    def _cpu_group(cls) -> Any:
        """A group that needs no GPU, which would have to finish its work first."""
        default = dist.distributed_c10d._get_default_group()
        if default not in cls._groups:
            on_cpu = "gloo" in dist.get_backend()
            cls._groups[default] = default if on_cpu else dist.new_group(backend="gloo")
        return cls._groups[default]

    def announce(self, batch: Any) -> Any:
        """Says what this rank has in the next round, does not wait for the others, and gives the batch back."""
        own = torch.tensor([0 if batch is END else ignorant_find_batch_size(batch) or 1, self._tag])
        told = [torch.empty_like(own) for _ in range(self._state.num_processes)]
        self._announced.append((told, dist.all_gather(told, own, group=self._group, async_op=True), self._tag))
        self._tag += 1
        return batch

    def sizes(self) -> list[int]:
        """What all ranks have in the oldest round that was not asked for.

        Raises:
            DistributedError: the ranks are in different loops, or at different batches.
        """
        told, work, tag = self._announced.popleft()
        attend(self._state, "a loop over a prepared loader", lambda: work)
        sizes, tags = torch.stack(told).T.tolist()
        if set(tags) != {tag}:
            raise DistributedError(
                "the ranks are not at the same batch of the same loader: some of them left a loop over it earlier."
                " Let all ranks break out of a loop at the same batch (accelerator.set_trigger, check_trigger)"
            )
        return sizes  # type: ignore[no-any-return]


def together(fetch: Callable[[], Any], place: Callable[[Any], Any], state: GradientState) -> Iterator[Round]:
    """An epoch in rounds of all ranks. Collective: every rank must iterate it.

    Ranks go on by themselves after all where one has no more batches and the others do not need it: the loop's body
    asks other ranks nothing, and no model is in training or split over the ranks.

    Args:
        fetch: gives this rank's next batch, or `END`.
        place: moves a batch that another rank lends to the device.
        state: knows the models.
    """
    exchange = _Exchange()
    batch, following = (exchange.announce(fetch()) for _ in range(2))
    sizes, coming = exchange.sizes(), exchange.sizes()
    began, asked, spare = False, False, END
    while any(sizes):
        joined = asked or state._ranks_work_together()
        if _uneven(sizes) and not joined:
            yield from _alone(batch, following, fetch)
            return
        if not began and _uneven(sizes):
            spare = _lent(batch, sizes, place)
        over = not any(coming)
        after = END if over else exchange.announce(END if following is END else fetch())
        filler = batch is END
        if filler:
            batch = copy.deepcopy(spare)
        elif following is END and not over:
            spare = copy.deepcopy(batch)  # the loop's body may change what it gets
        last = over if joined or not began else following is END
        before = _collectives()
        yield Round(batch, last, sizes, filler)
        if over:
            return
        began, asked = True, asked or _collectives() != before
        batch, following = following, after
        sizes, coming = coming, exchange.sizes()


def _uneven(sizes: list[int]) -> bool:
    return any(sizes) and not all(sizes)


def _alone(batch: Any, following: Any, fetch: Callable[[], Any]) -> Iterator[Round]:
    while batch is not END:
        yield Round(batch, following is END)
        batch, following = following, END if following is END else fetch()


def _lent(batch: Any, sizes: list[int], place: Callable[[Any], Any]) -> Any:
    """The first batch, of the first rank that has one, for ranks without any. Collective."""
    lender = next(rank for rank, size in enumerate(sizes) if size)
    mine = PartialState().process_index == lender
    (lent,) = broadcast_object_list([send_to_device(batch, "cpu") if mine else None], from_process=lender)
    return batch if batch is not END else place(lent)


def _collectives() -> int:
    """Number of collectives that this rank took part in so far."""
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())


@contextmanager
def even_batches_set(loaders: Sequence[Any], even_batches: bool | None) -> Iterator[None]:
    """Within the block map-style loaders fill up their last batches, or do not; None leaves them.

    Args:
        loaders: prepared ones. A dispatched or iterable one cannot be changed, which is a warning.
    """
    shards = [shard for loader in loaders if (shard := _shard_of(loader)) is not None]
    if even_batches is not None and len(shards) < len(loaders):
        warnings.warn(
            f"even_batches={even_batches} is for map-style loaders that are not dispatched: it leaves"
            f" {len(loaders) - len(shards)} of the {len(loaders)} prepared loaders as they are",
            stacklevel=5,
        )
    before = [shard.even_batches for shard in shards]
    for shard in shards:
        shard.even_batches = shard.even_batches if even_batches is None else even_batches
    try:
        yield
    finally:
        for shard, value in zip(shards, before, strict=True):
            shard.even_batches = value


def _shard_of(loader: Any) -> BatchSamplerShard | None:
    return next((each for each in samplers_of(loader) if isinstance(each, BatchSamplerShard)), None)
