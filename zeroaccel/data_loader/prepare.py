"""From the script's `DataLoader` to a prepared one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from zeroaccel.config.types import RNGType
from zeroaccel.data_loader.loaders import (
    DataLoaderDispatcher,
    DataLoaderShard,
    SkipDataLoader,
    refuse_mesh,
)
from zeroaccel.data_loader.parts import get_sampler, kept_options, outer_sampler, samplers_of, source_options
from zeroaccel.data_loader.position import Positioned
from zeroaccel.data_loader.sharding import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    check_divides,
)
from zeroaccel.data_loader.stateful import StatefulShard, keeps_its_place
from zeroaccel.distributed.random import agreed
from zeroaccel.errors import ConfigError
from zeroaccel.state import PartialState


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[str | RNGType] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> DataLoader[Any]:
    """Shards a loader over the ranks.

    Args:
        dataloader: the script's.
        device: where batches go, with `put_on_device`.
        num_processes, process_index: world size and rank; default: this run's.
        split_batches: the loader's batch size is that of all ranks together.
        put_on_device: move the batches.
        rng_types: generators to give the same state on every rank before each epoch.
        dispatch_batches: rank 0 reads and hands out; None: for iterable datasets, if batches are moved.
        even_batches: repeat samples so that every rank gets equally many batches.
        slice_fn_for_dispatch: how rank 0's batch is cut.
        use_seedable_sampler, data_seed: shuffle by a seed of its own.
        non_blocking: move without waiting.
        use_stateful_dataloader: after `load_state_dict` the next loop goes on at that position by itself.

    Raises:
        ConfigError: a batch size that cannot be split, or dispatching without moving.
        UnsupportedError: a device mesh.
    """
    refuse_mesh(torch_device_mesh)
    iterable = isinstance(dataloader.dataset, IterableDataset)
    dispatch = put_on_device and iterable if dispatch_batches is None else dispatch_batches
    if dispatch and not put_on_device:
        raise ConfigError("dispatch_batches=True moves batches to the device: it needs device_placement=True")
    state = PartialState()
    ranks = (
        state.num_processes if num_processes is None else num_processes,
        state.process_index if process_index is None else process_index,
    )
    if split_batches:
        _check_splits(dataloader, ranks[0])
    sampler = _seedable(dataloader, data_seed, ranks[0]) if use_seedable_sampler else None
    if use_stateful_dataloader and sampler is None:
        _shared_generator(samplers_of(dataloader)[-1])  # so that any number of ranks can take up the order
    if dispatch:
        made: Any = _dispatcher(dataloader, split_batches, non_blocking, slice_fn_for_dispatch)
    else:
        made = _shard(dataloader, ranks, split_batches, even_batches, seeded=sampler is not None)
        made.device = device if put_on_device else None
        made._non_blocking = non_blocking
        made.rng_types = _usable_rng_types(rng_types, made.synchronized_generator)
        made._world_size = ranks[0]
    made.use_stateful_dataloader = use_stateful_dataloader
    if sampler is not None:
        made.set_sampler(sampler)
    return made  # type: ignore[no-any-return]


def _check_splits(dataloader: DataLoader[Any], num_processes: int) -> None:
    size = dataloader.batch_size
    if size is None:
        size = getattr(outer_sampler(dataloader), "batch_size", None)
    if size is None:
        raise ConfigError(
            "split_batches needs a batch size, and neither the DataLoader nor its batch sampler"
            f" ({type(dataloader.batch_sampler).__name__}) has one: give the batch sampler a batch_size attribute"
        )
    check_divides(size, num_processes)


def _seedable(dataloader: DataLoader[Any], data_seed: int | None, num_processes: int) -> SeedableRandomSampler | None:
    sampler = get_sampler(dataloader)
    if not isinstance(sampler, RandomSampler):
        return None
    if data_seed is None:
        # Ranks whose seeds differ (`set_seed(..., device_specific=True)`) must shuffle alike all the same.
        data_seed = torch.random.initial_seed()
        data_seed = agreed(data_seed) if num_processes > 1 else data_seed
    return SeedableRandomSampler(
        data_source=sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator or torch.Generator(),
        data_seed=data_seed,
    )


def _usable_rng_types(rng_types: list[Any] | None, generator: torch.Generator | None) -> list[Any] | None:
    if rng_types is None:
        return None
    return [kind for kind in rng_types if generator is not None or kind != RNGType.GENERATOR]


def _dispatcher(
    dataloader: DataLoader[Any], split_batches: bool, non_blocking: bool, slice_fn: Callable[..., Any] | None
) -> DataLoaderDispatcher:
    options = {**kept_options(dataloader), **source_options(dataloader, outer_sampler(dataloader))}
    options.pop("generator", None)
    return DataLoaderDispatcher(
        dataloader.dataset,
        split_batches=split_batches,
        _drop_last=dataloader.drop_last,
        _non_blocking=non_blocking,
        slice_fn=slice_fn,
        **options,
    )


def _shard(
    dataloader: DataLoader[Any], ranks: tuple[int, int], split_batches: bool, even_batches: bool, seeded: bool
) -> DataLoaderShard:
    num_processes, process_index = ranks
    dataset: Any = dataloader.dataset
    sampler: Any = outer_sampler(dataloader)
    generator: torch.Generator | None = None
    options = source_options(dataloader, sampler)
    if num_processes > 1 and isinstance(dataset, IterableDataset):
        generator = getattr(dataset, "generator", None)
        dataset = _iterable_shard(dataloader, ranks, split_batches)
        if split_batches:
            options["batch_size"] //= num_processes
    elif num_processes > 1:
        if not seeded:
            generator = _shared_generator(samplers_of(dataloader)[-1])
        shard = BatchSamplerShard(sampler, num_processes, process_index, split_batches, even_batches)
        options = source_options(dataloader, shard)
    return DataLoaderShard(
        dataset,
        synchronized_generator=generator,
        _drop_last=dataloader.drop_last,
        **options,
        **kept_options(dataloader),
    )


def _iterable_shard(dataloader: DataLoader[Any], ranks: tuple[int, int], split_batches: bool) -> Any:
    num_processes, process_index = ranks
    dataset: Any = dataloader.dataset
    if type(dataset).__module__.startswith("datasets.") and not split_batches and dataset.n_shards >= num_processes:
        return dataset.shard(num_shards=num_processes, index=process_index)  # each rank reads files of its own
    shard = StatefulShard if keeps_its_place(dataset) else IterableDatasetShard
    return shard(
        dataset,
        batch_size=dataloader.batch_size,
        drop_last=dataloader.drop_last,
        num_processes=num_processes,
        process_index=process_index,
        split_batches=split_batches,
    )


def _shared_generator(sampler: Any) -> torch.Generator | None:
    """The generator that shuffles, made where the sampler would draw from each rank's own."""
    if not hasattr(sampler, "generator"):
        return None
    if sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(agreed(int(torch.empty((), dtype=torch.int64).random_().item())))
    return sampler.generator  # type: ignore[no-any-return]


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """A loader that begins behind the first `num_batches` batches, for the rest of an interrupted epoch.

    Args:
        dataloader: prepared or not; it stays as it is.
        num_batches: batches of this rank.
    """
    iterable = isinstance(dataloader.dataset, IterableDataset)
    if isinstance(dataloader, DataLoaderDispatcher):
        made: Any = _skipping_dispatcher(dataloader, num_batches, iterable)
    else:
        sampler = None if iterable else SkipBatchSampler(outer_sampler(dataloader), num_batches)
        options = {**kept_options(dataloader), **source_options(dataloader, sampler)}
        if isinstance(dataloader, DataLoaderShard):
            made = _skipping_shard(dataloader, num_batches if iterable else 0, options)
        elif iterable:
            made = SkipDataLoader(dataloader.dataset, skip_batches=num_batches, **options)
        else:
            made = DataLoader(dataloader.dataset, **options)
    return _mark_like(dataloader, made, num_batches)


def _skipping_dispatcher(dataloader: DataLoaderDispatcher, num_batches: int, iterable: bool) -> DataLoaderDispatcher:
    # Rank 0 reads several batches of the sampler for each one that a rank sees.
    read = num_batches * (1 if dataloader.split_batches else dataloader.state.num_processes)
    sampler = None if iterable else SkipBatchSampler(outer_sampler(dataloader), read)
    options = {**kept_options(dataloader), **source_options(dataloader, sampler)}
    options.pop("generator", None)
    return DataLoaderDispatcher(
        dataloader.dataset,
        split_batches=dataloader.split_batches,
        skip_batches=dataloader.skip_batches + num_batches if iterable else 0,
        _drop_last=dataloader._drop_last,
        _non_blocking=dataloader._non_blocking,
        slice_fn=dataloader.slice_fn,
        iteration=dataloader.iteration,
        **options,
    )


def _skipping_shard(dataloader: DataLoaderShard, num_batches: int, options: dict[str, Any]) -> DataLoaderShard:
    return DataLoaderShard(
        dataloader.dataset,
        device=dataloader.device,
        rng_types=dataloader.rng_types,
        synchronized_generator=dataloader.synchronized_generator,
        skip_batches=dataloader.skip_batches + num_batches,
        _drop_last=dataloader._drop_last,
        _non_blocking=dataloader._non_blocking,
        iteration=dataloader.iteration,
        **options,
    )


def _mark_like(original: Any, made: Any, left_out: int) -> Any:
    if getattr(original, "_is_accelerate_prepared", False):
        made._is_accelerate_prepared = True
    if isinstance(original, Positioned) and isinstance(made, Positioned):
        made._world_size, made._left_out = original._world_size, original._left_out + left_out
        made._origin, made._loaded = original._origin or original, original._loaded
    return made
