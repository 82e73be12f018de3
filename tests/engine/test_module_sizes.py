"""Sizes of modules are Accelerate's."""

from __future__ import annotations

from typing import Any

import accelerate.utils
import pytest
import torch
from torch import nn

from zeroaccel.utils import calculate_maximum_sizes, compute_module_sizes, get_max_layer_size


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class Model(nn.Module):
    def __init__(self, whole: list[str] | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(6)
        self.tied = self.first
        self.register_buffer("mask", torch.zeros(50, dtype=torch.bool), persistent=False)
        if whole is not None:
            self._no_split_modules = whole


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float16},
    {"dtype": "float16"},
    {"dtype": "torch.float64"},
    {"buffers_only": True},
    {"dtype": torch.float16, "special_dtypes": {"first.weight": torch.float32, "scale": "float64"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sizes_are_accelerates(options: dict[str, Any]) -> None:
    model = Model(None)
    assert compute_module_sizes(model, **options) == accelerate.utils.compute_module_sizes(model, **options)


@pytest.mark.parametrize("whole", [None, [], ["Block"], ["Model"]], ids=str)
def test_the_largest_layer_is_accelerates(whole: list[str] | None) -> None:
    from accelerate.utils.modeling import get_max_layer_size as theirs

    model = Model(whole)
    assert calculate_maximum_sizes(model) == accelerate.utils.calculate_maximum_sizes(model)
    sizes = compute_module_sizes(model)
    modules = list(model.named_children())
    assert get_max_layer_size(modules, sizes, whole or []) == theirs(modules, sizes, whole or [])


def test_a_module_without_tensors_has_no_largest_layer() -> None:
    assert calculate_maximum_sizes(nn.ReLU()) == accelerate.utils.calculate_maximum_sizes(nn.ReLU()) == (0, (0, []))
