"""Loaders: sharding, dispatching, moving to the device, and knowing where an epoch ends."""

from zeroaccel.data_loader.loaders import (
    DataLoaderDispatcher,
    DataLoaderShard,
    DataLoaderStateMixin,
    SkipDataLoader,
)
from zeroaccel.data_loader.parts import get_sampler
from zeroaccel.data_loader.prepare import prepare_data_loader, skip_first_batches
from zeroaccel.data_loader.sharding import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)

__all__ = [
    "BatchSamplerShard",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "get_sampler",
    "prepare_data_loader",
    "skip_first_batches",
]
