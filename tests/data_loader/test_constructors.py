"""Loaders that a script makes by their constructors, instead of by `prepare`."""

from __future__ import annotations

from typing import Any

import accelerate.data_loader as theirs
import pytest
import torch
from torch.utils.data import DataLoader

import zeroaccel.data_loader as ours
from tests.data_loader.sources import Numbers, read
from zeroaccel.errors import UnsupportedError


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("name", ["DataLoaderShard", "DataLoaderDispatcher", "SkipDataLoader"])
def test_loaders_made_by_hand_read_what_accelerates_do(name: str, stateful: bool) -> None:
    options: dict[str, Any] = {"batch_size": 3, "use_stateful_dataloader": stateful}
    options |= {"skip_batches": 1} if name == "SkipDataLoader" else {}
    made, expected = (getattr(module, name)(Numbers(10), **options) for module in (ours, theirs))
    assert isinstance(made, DataLoader)
    assert isinstance(made, ours.DataLoaderStateMixin)
    assert made.use_stateful_dataloader is stateful
    assert read(made) == read(expected)
    assert made.total_batch_size == 3
    assert isinstance(next(iter(made)), torch.Tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.DataLoaderShard(Numbers(4), torch_device_mesh="mesh", batch_size=2),
        lambda: ours.DataLoaderDispatcher(Numbers(4), torch_device_mesh="mesh", batch_size=2),
        lambda: ours.prepare_data_loader(DataLoader(Numbers(4)), torch_device_mesh="mesh"),
    ],
)
def test_a_device_mesh_is_refused(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="torch_device_mesh is for tensor parallelism"):
        make()
