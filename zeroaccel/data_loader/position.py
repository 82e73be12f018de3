"""Where a loader stands in its epoch, and how an interrupted epoch is taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from zeroaccel.data_loader.parts import generators_of, get_sampler, outer_sampler
from zeroaccel.data_loader.sharding import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from zeroaccel.data_loader.stateful import Places, keeps_its_place
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.logging import library_logger

logger = library_logger(__name__)


@dataclass(frozen=True)
class Position:
    """A place in an epoch, the same on every rank; its fields are the keys of `state_dict()`.

    Attributes:
        epoch: number of the epoch.
        batches: batches that each rank drew in it. Those that were only fetched ahead do not count.
        read: batches that the ranks drew together from the loader that the script made.
        world_size: number of ranks.
        batch_size: of the loader that the script made, None where it has none.
        workers: processes that read for it on each rank.
        place: what an iterable dataset that keeps its place says of it (stateful.py), else None.
        seed: of a `SeedableRandomSampler`, else None.
        generators: states of the loader's generators when the epoch began.
        torch_rng: state of PyTorch's generator then; None where nothing of the order depends on it.
        seeded_workers: whether a seed for workers was drawn first, which persistent ones do not need again.
    """

    epoch: int = 0
    batches: int = 0
    read: int = 0
    world_size: int = 1
    batch_size: int | None = None
    workers: int = 0
    place: Any = None
    seed: int | None = None
    generators: tuple[torch.Tensor, ...] = ()
    torch_rng: torch.Tensor | None = None
    seeded_workers: bool = True

    @classmethod
    def from_state(cls, state: Any) -> Position:
        """The position that a `state_dict()` holds.

        Raises:
            ConfigError: it is something else.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(state, dict) or set(state) != names:
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ConfigError(
                f"this is no state of a prepared loader, which has the keys {sorted(names)}, but: {found}. Pass what"
                " the loader's state_dict() gave"
            )
        return cls(**{**state, "generators": tuple(state["generators"])})

    def to_state(self) -> dict[str, Any]:
        """As a dictionary of numbers and tensors, which `torch.load(..., weights_only=True)` reads."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"generators": list(self.generators)}


class Positioned(DataLoader[Any]):
    """What prepared loaders know of their position.

    Attributes:
        iteration: number of the next epoch, or the running one.
        use_stateful_dataloader: whether an epoch goes on where a loaded position says, by itself; else the script
            skips.
    """

    iteration = 0
    use_stateful_dataloader = False
    _world_size = 1
    _left_out = 0  # batches that skip_first_batches took away
    _loaded: Position | None = None  # to be taken up by the next epoch
    _began: Position | None = None  # where the newest epoch began, or was taken up; None once it is over
    _drawn = 0  # batches since then
    _origin: Positioned | None = None  # what skip_first_batches made this of
    _rest: Positioned | None = None  # what it made of this, while that is iterated
    _places: Places | None = None  # reads the newest epoch of a dataset that keeps its place

    @property
    def _read_in_turn(self) -> int:
        """Batches of the script's loader that make one batch on every rank."""
        raise NotImplementedError

    @property
    def _may_draw_from_torch(self) -> bool:
        """Whether the order may come from PyTorch's generator; several ranks shuffle with one of their own."""
        return self._world_size == 1

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, also in the middle of an epoch, where the batch in hand counts as drawn.

        The same on every rank, unless each reads an iterable dataset of its own.
        """
        if self._rest is not None:
            return self._rest.state_dict()
        position = self._loaded or self._now()
        if position is None or position.epoch != self.iteration:
            position = self._at_beginning()
        return position.to_state()

    def _now(self) -> Position | None:
        began, drawn = self._began, self._drawn
        if began is None:
            return None
        read = began.read + drawn * self._read_in_turn
        place = None if self._places is None else self._places.after(read)
        return replace(began, batches=began.batches + drawn, read=read, place=place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the next epoch to the one of `state_dict`, in the same order.

        With `DataLoaderConfiguration(use_stateful_dataloader=True)` it also begins at that position, on any number of
        ranks if the dataset is map-style. Else the script leaves out what it had: `skip_first_batches`.

        Raises:
            ConfigError: the state is not of such a loader, or of a batch size by which its position cannot be told.
            UnsupportedError: an iterable dataset, and another number of ranks.
        """
        position = Position.from_state(state_dict)
        if self.use_stateful_dataloader and len(position.generators) != len(generators_of(self)):
            raise ConfigError(
                f"the loader that this state was taken of had {len(position.generators)} generators, this one has"
                f" {len(generators_of(self))}: prepare the loader with the same sampler and the same options"
            )
        if self.use_stateful_dataloader and position.batches:
            position = self._in_my_world(position)
        self.iteration, self._loaded, self._began = position.epoch, position, None
        self._iterator = None  # persistent workers may be in another epoch
        if position.batches and not self.use_stateful_dataloader:
            logger.info(
                "a loader stands at batch %d of epoch %d: skip_first_batches(loader, %d) leaves out what was drawn,"
                " DataLoaderConfiguration(use_stateful_dataloader=True) does it by itself",
                *(position.batches, position.epoch, position.batches),
            )

    def _in_my_world(self, position: Position) -> Position:
        """The same place for this world size and batch size."""
        if isinstance(self.dataset, IterableDataset):
            self._refuse_another_stream(position)
            return position
        size = getattr(outer_sampler(self), "batch_size", None)
        if position.world_size == self._world_size and position.batch_size == size:
            return position
        read = position.read
        if position.batch_size != size:
            samples = read * (position.batch_size or 1)
            read, rest = divmod(samples, size or 1)
            if rest:
                raise ConfigError(
                    f"{samples} samples of this epoch were drawn, in batches of {position.batch_size}; batches of"
                    f" {size} do not come to that number: use a batch size that divides {samples}"
                )
        return replace(position, read=read, batches=read // self._read_in_turn, world_size=self._world_size)

    def _refuse_another_stream(self, position: Position) -> None:
        """An iterable dataset has one place, in the order in which all ranks and workers read it together."""

        def told(ranks: int, batch_size: int | None, workers: int) -> str:
            return f"world size {ranks}, batch size {batch_size} and num_workers {workers}"

        then = told(position.world_size, position.batch_size, position.workers)
        now = told(self._world_size, self.batch_size, self.num_workers)
        if then != now:
            raise UnsupportedError(
                f"an iterable dataset was read up to batch {position.batches} with {then}, and cannot be taken up there"
                f" with {now}: resume with the same, or load {{**state, 'batches': 0, 'read': 0}} to begin that epoch"
                " anew, or use a map-style dataset"
            )

    def _at_beginning(self) -> Position:
        sampler = get_sampler(self)
        iterable = isinstance(self.dataset, IterableDataset)
        size = self.batch_size if iterable else getattr(outer_sampler(self), "batch_size", None)
        return Position(
            epoch=self.iteration,
            world_size=self._world_size,
            batch_size=size,
            workers=self.num_workers,
            seed=sampler.initial_seed if isinstance(sampler, SeedableRandomSampler) else None,
            generators=tuple(generator.get_state() for generator in generators_of(self)),
            seeded_workers=self._iterator is None,
        )

    # --- while iterated -----------------------------------------------------------------------------------------

    def _take_up(self) -> Position | None:
        """Called when an epoch begins: the loaded position, if it is of this epoch, with its order restored."""
        loaded, self._loaded, self._rest = self._loaded, None, None
        if self._origin is not None:
            self._origin._loaded, self._origin._rest = None, self
        if loaded is None or loaded.epoch != self.iteration:
            return None
        # A script that skips on another number of ranks may have other generators: then in an order of their own.
        for generator, state in zip(generators_of(self), loaded.generators, strict=self.use_stateful_dataloader):
            generator.set_state(state)
        sampler = get_sampler(self)
        if isinstance(sampler, SeedableRandomSampler) and loaded.seed is not None:
            sampler.initial_seed = loaded.seed
        return loaded

    def _begin_at(self, taken: Position | None) -> None:
        """An epoch begins, or is taken up."""
        goes_on = taken is not None and self.use_stateful_dataloader
        batches = self._left_out + (taken.batches if taken is not None and goes_on else 0)
        read = self._left_out * self._read_in_turn + (taken.read if taken is not None and goes_on else 0)
        began = replace(self._at_beginning(), batches=batches, read=read)
        if taken is None:
            self._began = replace(began, torch_rng=torch.get_rng_state() if self._may_draw_from_torch else None)
        else:
            self._began = replace(began, torch_rng=taken.torch_rng, seeded_workers=taken.seeded_workers)
        self._drawn = 0

    def _open(self, taken: Position | None) -> Iterator[Any]:
        """The source's batches, behind those that `taken` says were read."""
        if taken is None:
            return self._read_from(0)
        read = taken.read if self.use_stateful_dataloader else 0
        own, self.generator = self.generator, self.generator if taken.seeded_workers else torch.Generator()
        try:
            # Beginning the epoch drew from PyTorch's generator before the position was taken: not once more.
            rng = torch.get_rng_state() if taken.torch_rng is None else taken.torch_rng
            return _under(rng, lambda: self._read_from(read, taken.place))
        finally:
            self.generator = own

    def _read_from(self, read: int, place: Any = None) -> Iterator[Any]:
        if self.use_stateful_dataloader and keeps_its_place(self.dataset):
            # Two batches more than the script has are read at most (joint.py), on rank 0 alone for all ranks.
            self._places = self._places or Places(self, ahead=2 * self._read_in_turn)
            return self._places.read_from(read, place if read else None, self.generator)
        source = outer_sampler(self)
        if read == 0:
            return DataLoader.__iter__(self)
        if isinstance(self.dataset, IterableDataset):
            return islice(DataLoader.__iter__(self), read, None)
        if isinstance(source, BatchSamplerShard):
            source.begin_at = read
            return DataLoader.__iter__(self)
        # The iterator keeps what it finds here; a DataLoader refuses an assignment.
        name = "batch_sampler" if source is self.batch_sampler else "sampler"
        vars(self)[name] = _SkipOnce(source, read)
        try:
            return DataLoader.__iter__(self)
        finally:
            vars(self)[name] = source

    def _epoch_drawn(self) -> None:
        """The last batch was given to the script, which came back for another one."""
        self.iteration += 1
        self._began = None
        if self._origin is not None:
            self._origin._rest = self._origin._began = None


class _SkipOnce(SkipBatchSampler):
    """Leaves its first batches out in the next epoch, and in no other: persistent workers' iterator keeps it."""

    def __iter__(self) -> Iterator[list[Any]]:
        skipped, self.skip_batches = self.skip_batches, 0
        yield from islice(iter(self.batch_sampler), skipped, None)


def _under(rng: torch.Tensor, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The iterator that `make` gives; what it draws for its order comes from PyTorch's generator in state `rng`."""
    now = torch.get_rng_state()
    torch.set_rng_state(rng)
    try:
        source = make()
        first = list(islice(source, 1))  # samplers draw when they are asked for the first time
    finally:
        torch.set_rng_state(now)
    return chain(first, source)
