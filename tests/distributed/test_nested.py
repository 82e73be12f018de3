"""Nested data of one process, compared with Accelerate's functions of the same names."""

from __future__ import annotations

import pickle
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import accelerate.utils as theirs
import pytest
import torch

from zeroaccel.distributed import operations as ours
from zeroaccel.errors import ConfigError, ConfigTypeError

Pair = namedtuple("Pair", ["left", "right"])


def batch() -> dict[str, Any]:
    return {
        "x": torch.arange(6).view(3, 2),
        "nested": [Pair(torch.ones(3), (torch.zeros(3, dtype=torch.bfloat16),)), {"y": torch.ones(3)}],
    }


# Each is called with either library.
SAME: dict[str, Callable[[Any], Any]] = {
    "find_batch_size": lambda ops: ops.find_batch_size(batch()),
    "find_batch_size behind a text": lambda ops: ops.find_batch_size({"x": torch.ones(2), "y": "text"}),
    "ignorant_find_batch_size": lambda ops: ops.ignorant_find_batch_size({"x": "text"}),
    "listify": lambda ops: ops.listify(batch()),
    "slice_tensors": lambda ops: ops.listify(ops.slice_tensors(batch(), slice(1, 3))),
    "concatenate": lambda ops: ops.listify(ops.concatenate([batch(), batch()])),
    "concatenate columns": lambda ops: ops.concatenate([torch.ones(2, 1), torch.zeros(2, 2)], dim=1).tolist(),
    "concatenate one object": lambda ops: ops.concatenate(["text"]),
    "find_device": lambda ops: ops.find_device(["text", {"x": torch.ones(1)}]),
    "find_device without tensors": lambda ops: ops.find_device(["text"]),
    "convert_to_fp32": lambda ops: str(ops.convert_to_fp32(batch())),
    "is_namedtuple": lambda ops: [ops.is_namedtuple(value) for value in (Pair(1, 2), (1, 2), [1])],
    "honor_type": lambda ops: [ops.honor_type(like, iter("ab")) for like in (Pair(1, 2), (), [])],
    "get_data_structure": lambda ops: str(ops.get_data_structure(batch())),
    "initialize_tensors": lambda ops: str(
        ops.get_data_structure(ops.initialize_tensors(ops.get_data_structure(batch())))
    ),
    "send_to_device": lambda ops: str(ops.send_to_device(batch(), "meta")),
    "send_to_device, one key stays": lambda ops: str(ops.send_to_device(batch(), "meta", skip_keys="x")),
    "recursively_apply": lambda ops: ops.recursively_apply(
        lambda value, add: value + add, {"x": [1, (2, "b")]}, 10, test_type=lambda value: isinstance(value, int)
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_nested_data_becomes_what_accelerate_makes_of_it(name: str) -> None:
    call = SAME[name]
    assert repr(call(ours)) == repr(call(theirs))


@pytest.mark.parametrize(
    ("ranks", "padded"), [(2, [1, 2, 3, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 3]), (5, [1, 2, 3, 3, 3])]
)
def test_a_batch_is_padded_with_its_last_element_until_the_ranks_divide_it(ranks: int, padded: list[int]) -> None:
    """As Accelerate's documentation says; its code fills with zeros, and batches that need none as well."""
    assert ours.pad_input_tensors({"x": torch.tensor([1, 2, 3])}, 3, ranks)["x"].tolist() == padded


class Encoding(UserDict[str, Any]):
    """Has a `to` that takes a device only, as tokenizers' results."""

    def to(self, device: Any) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_what_can_move_itself_is_asked_to() -> None:
    moved = ours.send_to_device([Encoding(x=torch.ones(1))], "meta", non_blocking=True)
    assert type(moved[0]) is Encoding
    assert moved[0]["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ours.find_batch_size([]), ConfigError, "an empty list has no batch size"),
        (lambda: ours.find_batch_size({"x": 1}), ConfigTypeError, "no tensor in this dict"),
        (lambda: ours.find_batch_size(torch.tensor(1)), ConfigError, r"give it one, tensor\[None\]"),
        (lambda: ours.concatenate(["a", "b"]), ConfigTypeError, "only tensors can be concatenated, not str"),
        (lambda: ours.pad_input_tensors(["a"], 1, 2), ConfigTypeError, "pad got a str"),
    ],
)
def test_what_cannot_be_measured_or_joined_is_refused(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_forward_function_can_return_fp32() -> None:
    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Doubles."""
        return {"logits": x * 2}

    converted: Any = ours.convert_outputs_to_fp32(forward)
    assert converted(torch.ones(1, dtype=torch.bfloat16))["logits"].dtype == torch.float32
    assert converted.__wrapped__.__wrapped__ is forward
    with pytest.raises(pickle.PicklingError, match="unwrap_model"):
        pickle.dumps(converted.__wrapped__)
