"""Models that are made without memory, or on a device, beside Accelerate's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.hooks import remove_hook_from_module as theirs_remove_hook
from accelerate.utils import has_offloaded_params as theirs_has_offloaded

from zeroaccel import init_empty_weights, init_on_device
from zeroaccel.hooks import remove_hook_from_module
from zeroaccel.utils import has_offloaded_params


class Marked(torch.nn.Parameter):
    """A parameter of its own class, with an attribute."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True, mark: str = "") -> Marked:
        made = torch.nn.Parameter.__new__(cls, data, requires_grad)
        made.mark = mark
        made._is_hf_initialized = True  # as transformers marks what it has loaded
        return made


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.indices = torch.nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)
        self.register_parameter("none", None)
        self.marked = Marked(torch.ones(2), mark="kept")


def made(context: AbstractContextManager[Any]) -> dict[str, Any]:
    with context:
        model = Model()
    parameters = {
        name: (str(each.device), each.requires_grad, each.dtype, type(each).__name__, getattr(each, "mark", None))
        for name, each in model.named_parameters()
    }
    return parameters | {name: str(buffer.device) for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("include_buffers", [None, False, True])
def test_empty_weights_are_where_accelerates_are(include_buffers: bool | None) -> None:
    ours = made(init_empty_weights(include_buffers=include_buffers))
    assert ours == made(accelerate.init_empty_weights(include_buffers=include_buffers))
    assert ours["linear.weight"] == ("meta", True, torch.float32, "Parameter", None)
    assert ours["marked"][-1] == "kept"
    assert ours["norm.running_mean"] == ("meta" if include_buffers else "cpu")
    assert str(Model().linear.weight.device) == "cpu"


def test_buffers_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_INIT_INCLUDE_BUFFERS", "true")
    assert made(init_empty_weights()) == made(accelerate.init_empty_weights())
    assert made(init_empty_weights())["norm.running_mean"] == "meta"
    assert made(init_empty_weights(include_buffers=False))["norm.running_mean"] == "cpu"


def test_an_error_inside_of_the_block_leaves_no_trace() -> None:
    with pytest.raises(ZeroDivisionError), init_empty_weights():
        _ = 1 / 0
    assert str(Model().linear.weight.device) == "cpu"


def test_weights_can_be_assigned_to_a_model_made_on_meta() -> None:
    whole = Model()
    with init_on_device(torch.device("meta")):
        empty = Model()
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty.linear.weight, whole.linear.weight)


def test_tied_weights_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.second = torch.nn.Linear(2, 2)
            self.second.weight = self.first.weight

    with init_empty_weights():
        model = Tied()
    assert model.first.weight is model.second.weight
    assert len(list(model.parameters())) == 3


def test_modules_that_accelerate_offloads_are_recognized() -> None:
    model = torch.nn.Linear(2, 2)
    assert has_offloaded_params(model) is theirs_has_offloaded(model) is False
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    assert has_offloaded_params(model) is theirs_has_offloaded(model) is True


@pytest.mark.parametrize("recurse", [False, True])
def test_hooks_of_accelerate_are_taken_away_as_there(recurse: bool) -> None:
    shown = []
    for remove in (theirs_remove_hook, remove_hook_from_module):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        for module in (model, model[0]):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        assert remove(model, recurse=recurse) is model
        shown.append([hasattr(module, name) for module in (model, model[0]) for name in ("_hf_hook", "_old_forward")])
        assert model(torch.ones(1, 2)).shape == (1, 2)
    assert shown[0] == shown[1] == [False, False, not recurse, not recurse]


def test_a_module_without_hooks_comes_back_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert remove_hook_from_module(model) is model
    assert "forward" not in vars(model)
