"""The small option objects."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from zeroaccel.config import options
from zeroaccel.config.options import GradScalerKwargs, ProfileKwargs, ProjectConfiguration, TorchDynamoPlugin
from zeroaccel.config.types import DynamoBackend, PrecisionType


def test_only_what_differs_from_the_defaults_is_handed_on() -> None:
    assert GradScalerKwargs().to_kwargs() == {}
    assert GradScalerKwargs(init_scale=2.0, enabled=False).to_kwargs() == {"init_scale": 2.0, "enabled": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, None)),
        ({"project_dir": "p"}, ("p", "p")),
        ({"project_dir": "p", "logging_dir": "l"}, ("p", "l")),
    ],
)
def test_logs_go_to_the_project_unless_told_otherwise(given: dict[str, Any], expected: tuple[Any, Any]) -> None:
    made = ProjectConfiguration(**given)
    assert (made.project_dir, made.logging_dir) == expected


def test_compilation_is_off_and_can_be_asked_for_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TorchDynamoPlugin().backend is DynamoBackend.NO
    monkeypatch.setenv("ZEROACCEL_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ZEROACCEL_DYNAMO_USE_FULLGRAPH", "true")
    monkeypatch.setenv("ZEROACCEL_DYNAMO_USE_DYNAMIC", "false")
    made = TorchDynamoPlugin()
    assert (made.backend, made.fullgraph, made.dynamic) == (DynamoBackend.INDUCTOR, True, False)
    assert made.use_regional_compilation is False
    monkeypatch.setenv("ZEROACCEL_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    assert TorchDynamoPlugin().use_regional_compilation is True
    assert TorchDynamoPlugin(use_regional_compilation=False).use_regional_compilation is False


def test_profiler_is_built_from_its_options() -> None:
    with ProfileKwargs(activities=["cpu"], record_shapes=True).build() as profiler:
        pass
    assert profiler.record_shapes


def test_names_are_members_by_value() -> None:
    assert "fp16" in PrecisionType
    assert "fp32" not in PrecisionType
    assert str(PrecisionType.BF16) == "bf16"


@pytest.mark.parametrize("name", ["AutocastKwargs", "DistributedDataParallelKwargs", "GradScalerKwargs",
                                  "InitProcessGroupKwargs", "ProfileKwargs", "GradientAccumulationPlugin",
                                  "ProjectConfiguration"])  # fmt: skip
def test_fields_are_accelerates(name: str) -> None:
    import accelerate.utils

    theirs = {field.name for field in dataclasses.fields(getattr(accelerate.utils, name))}
    assert {field.name for field in dataclasses.fields(getattr(options, name))} == theirs
