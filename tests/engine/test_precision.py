"""Floating-point inputs of a 16-bit model: cast where that was asked for, else one error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.distributed.pool import RankPool
from tests.engine.small import FEATURES, accelerator, loader


class Recorder(nn.Module):
    """Notes the types of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
        values = [x, *(extra.values() if isinstance(extra, dict) else extra or [])]
        self.seen = [value.dtype for value in values]
        return self.layer(x)


def prepare(model: nn.Module, config: dict[str, Any] | None, precision: str | None, **plugin: Any) -> tuple[Any, Any]:
    prepared = accelerator(config, {"mixed_precision": precision} if precision else {}, zero_stage=2, **plugin)
    engine, _, _ = prepared.prepare(model, SGD(model.parameters(), lr=0.1), loader())
    return prepared, engine


ZERO = {"zero_optimization": {"stage": 2}}
# config, mixed_precision, cast_inputs, type that the model gets
CASTS: dict[str, tuple[dict[str, Any] | None, str | None, bool, torch.dtype]] = {
    "fp32": (None, None, False, torch.float32),
    "fp16 of the Accelerator": (None, "fp16", False, torch.float16),
    "fp16 auto in the config": ({**ZERO, "fp16": {"enabled": "auto", "auto_cast": True}}, "fp16", False, torch.float16),
    "fp16 of the config": ({**ZERO, "fp16": {"enabled": True, "auto_cast": True}}, None, False, torch.float16),
    "fp16, cast_inputs": ({**ZERO, "fp16": {"enabled": True}}, None, True, torch.float16),
    "fp16 auto_cast that is not on": (
        {**ZERO, "fp16": {"enabled": "auto", "auto_cast": True}},
        "no",
        False,
        torch.float32,
    ),
    "bf16, cast_inputs": (None, "bf16", True, torch.bfloat16),
}


def cast(name: str) -> None:
    config, precision, cast_inputs, expected = CASTS[name]
    prepared, engine = prepare(Recorder(), config, precision, cast_inputs=cast_inputs)
    x, numbers = torch.ones(2, FEATURES), torch.ones(2, dtype=torch.long)
    for extra in ({"position": x, "ids": numbers}, (x, numbers)):
        engine(x, extra=extra)
        assert engine.module.seen == [expected, expected, torch.long]
    assert x.dtype == torch.float32
    prepared.backward(engine(x).float().mean())
    prepared.free_memory()


@pytest.mark.parametrize("name", CASTS)
def test_inputs_are_cast(name: str, ranks: RankPool) -> None:
    ranks.run(cast, name=name)


class First(nn.Module):
    """A layer as the first of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return self.layer(pixels)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, 1),
    "convolution": lambda: nn.Conv1d(4, 2, 1),
    "recurrent": lambda: nn.GRU(FEATURES, 2),
    "attention": lambda: nn.TransformerEncoderLayer(FEATURES, 2, batch_first=True),
}


def mismatch(layer: str, precision: str) -> None:
    config = {**ZERO, "fp16": {"enabled": True}} if precision == "fp16" else None
    prepared, engine = prepare(First(LAYERS[layer]()), config, None if precision == "fp16" else precision)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    x = torch.ones(2, 4, FEATURES)
    engine(x.to(dtype))
    for args, kwargs in (((x,), {}), ((), {"pixels": x})):
        with pytest.raises(RuntimeError) as caught:
            engine(*args, **kwargs, labels=torch.zeros(2, dtype=torch.long))
        text = str(caught.value)
        assert f"computes in {dtype}, but got pixels (torch.float32)" in text
        assert "labels" not in text
        assert f"batch.to({dtype})" in text
        assert "DeepSpeedPlugin(cast_inputs=True)" in text
        assert type(caught.value.__cause__) in (RuntimeError, ValueError)
    prepared.free_memory()


@pytest.mark.parametrize(("layer", "precision"), [*((layer, "bf16") for layer in LAYERS), ("linear", "fp16")])
def test_a_mismatch_is_one_error_with_the_remedy(layer: str, precision: str, ranks: RankPool) -> None:
    ranks.run(mismatch, layer=layer, precision=precision)


class Nested(nn.Module):
    """Gets its tensors in a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, *batches: Any) -> torch.Tensor:
        return self.layer(batches[0]["views"][1])


class Broken(nn.Module):
    """Fails for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no weather today")


def other_errors() -> None:
    prepared, engine = prepare(Nested(), None, "bf16")
    with pytest.raises(RuntimeError, match=r"got input 0\['views'\]\[1\] \(torch.float32\): cast"):
        engine({"views": [torch.ones(2, FEATURES).bfloat16(), torch.ones(2, FEATURES)]})
    prepared.free_memory()
    prepared, engine = prepare(Broken(), None, "bf16")
    with pytest.raises(RuntimeError, match=r"^no weather today$"):
        engine(torch.ones(2, FEATURES))
    with pytest.raises(RuntimeError, match=r"^no weather today$"):
        engine(torch.ones(2, FEATURES).bfloat16())
    prepared.free_memory()


def test_the_input_is_named_and_other_errors_pass(ranks: RankPool) -> None:
    ranks.run(other_errors)
