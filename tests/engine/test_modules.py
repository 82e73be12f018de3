"""Questions about modules and tensors, against Accelerate's answers."""

from __future__ import annotations

from typing import Any

import accelerate.utils as theirs
import accelerate.utils.modeling as their_modeling
import pytest
import torch
from torch import nn

from zeroaccel.engine import modules as ours


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(2), persistent=False)


class Tied(nn.Module):
    """Two groups of tied parameters, at different depths, and a free one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.free = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(4, 4)
        self.first.weight = self.inner.linear.weight
        self.last = nn.Linear(4, 4)
        self.last.weight = self.inner.linear.weight
        self.last.bias = self.first.bias
        self.register_buffer("mask", torch.zeros(3), persistent=False)


def test_tied_parameters_are_grouped_as_in_accelerate() -> None:
    groups = ours.find_tied_parameters(Tied())
    assert groups == [["first.weight", "inner.linear.weight", "last.weight"], ["first.bias", "last.bias"]]
    assert sorted(groups) == sorted(theirs.find_tied_parameters(Tied()))
    assert ours.find_tied_parameters(Inner()) == []


def test_broken_ties_are_mended_with_the_first_real_parameter() -> None:
    model = Tied()
    groups = ours.find_tied_parameters(model)
    model.first.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    real = model.inner.linear.weight
    model.last.weight = nn.Parameter(torch.zeros(4, 4))
    ours.retie_parameters(model, groups)
    assert model.first.weight is model.last.weight is real
    assert ours.find_tied_parameters(model) == groups


@pytest.mark.parametrize("include_buffers", [True, False])
@pytest.mark.parametrize("recurse", [True, False])
def test_tensors_of_a_module_are_accelerates(include_buffers: bool, recurse: bool) -> None:
    options = {"include_buffers": include_buffers, "recurse": recurse}
    model = Tied()
    expected = [(name, id(tensor)) for name, tensor in theirs.named_module_tensors(model, **options)]
    assert [(name, id(tensor)) for name, tensor in ours.named_module_tensors(model, **options)] == expected


def test_buffers_that_are_not_saved_are_left_out_at_every_depth() -> None:
    model = Tied()
    saved = {name for name, _ in ours.named_module_tensors(model, recurse=True, remove_non_persistent=True)}
    assert saved == set(model.state_dict()) - {"first.weight", "last.weight", "last.bias"}


@pytest.mark.parametrize("fqns", [True, False])
@pytest.mark.parametrize("recurse", [True, False])
def test_names_of_buffers_that_are_not_saved(fqns: bool, recurse: bool) -> None:
    names = ours.get_non_persistent_buffers(Tied(), recurse=recurse, fqns=fqns)
    assert names == {"mask"} | ({"inner.cache" if fqns else "cache"} if recurse else set())


def test_modules_come_after_those_that_they_contain() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    ordered = ours.get_module_children_bottom_up(model)
    assert {id(module) for module in ordered} == {id(module) for module in model.modules()}
    for place, module in enumerate(ordered):
        assert all(any(child is earlier for earlier in ordered[:place]) for child in module.children())
    assert [name for name, _ in ours.get_module_children_bottom_up(model, return_fqns=True)][-1] == ""


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_bytes_of_a_dtype_are_accelerates(dtype: torch.dtype) -> None:
    assert ours.dtype_byte_size(dtype) == theirs.dtype_byte_size(dtype)


def test_views_share_their_storage_and_copies_do_not() -> None:
    tensor = torch.zeros(4, 4)
    assert ours.id_tensor_storage(tensor) == ours.id_tensor_storage(tensor[1:, 2]) == theirs.id_tensor_storage(tensor)
    assert ours.id_tensor_storage(tensor) != ours.id_tensor_storage(tensor.clone())
    meta = torch.empty(2, device="meta")
    assert ours.id_tensor_storage(meta) == their_modeling.id_tensor_storage(meta)


def test_compiled_modules_are_recognized_whole_and_within() -> None:
    compiled: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    holder = nn.Sequential(compiled)
    assert [ours.is_compiled_module(m) for m in (compiled, holder, nn.Linear(2, 2))] == [True, False, False]
    assert [ours.has_compiled_regions(m) for m in (holder, nn.Linear(2, 2))] == [True, False]
    assert not ours.is_peft_model(holder)
