"""Every private name of DeepSpeed in use is listed, and looked for before anything trains."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

import zeroaccel.engine
from zeroaccel.engine import compat
from zeroaccel.errors import EnvironmentProblem

ENGINE_ROOM = Path(zeroaccel.engine.__file__).parent
DRIVERS = (
    "construction.py",
    "deepspeed_masters.py",
    "fragments.py",
    "gradients.py",
    "reduction_order.py",
    "stepping.py",
)
HELD_IN = {"engine", "optimizer", "sharded", "wrapper", "swapper"}  # variables that hold objects of DeepSpeed
PUBLIC = {
    *("backward", "device", "fp16_enabled", "gradient_accumulation_steps", "gradient_clipping", "loss_scale", "module"),
    *("optimizer", "param_groups", "state", "step", "world_size", "zero_grad", "zero_optimization_stage"),
    *("zero_use_cpu_optimizer", "__dict__"),
}


def listed() -> set[str]:
    names = {name for owners in compat.PRIVATE_NAMES.values() for found in owners.values() for name in found}
    attributes = {name for pair in compat.OPTIMIZER_ATTRIBUTES.values() for half in pair for name in half}
    return names | attributes | {*compat.ENGINE_ATTRIBUTES, *compat.SWAPPER_ATTRIBUTES}


def holder(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def used() -> set[str]:
    trees = [ast.parse((ENGINE_ROOM / file).read_text()) for file in DRIVERS]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and holder(node.value) in HELD_IN
    }


def test_what_is_used_is_listed() -> None:
    assert used() - PUBLIC - listed() == set()


def test_what_is_listed_is_used() -> None:
    code = "\n".join(file.read_text() for file in ENGINE_ROOM.glob("*.py") if file.name != "compat.py")
    assert {name for name in listed() if name not in code} == set()


@pytest.mark.parametrize("version", ["0.18.9", "0.19.7", "0.20.0", "1.0"])
def test_another_deepspeed_is_refused_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(EnvironmentProblem, match=rf"{version} is not supported: install 'deepspeed>=0.19.8,<0.20'"):
        compat.check_deepspeed()


@pytest.mark.parametrize("version", ["0.19.8", "0.19.8+cu126", "0.19.12"])
def test_the_range_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    compat.check_deepspeed()


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DeepSpeedEngine, "_backward_epilogue")
    with pytest.raises(EnvironmentProblem, match=r"lacks .*DeepSpeedEngine\._backward_epilogue; install 'deepspeed"):
        compat.check_deepspeed()


def test_an_attribute_that_is_gone_is_named() -> None:
    present = (
        "_hp_optimizer_states_linked",
        "bf16_groups",
        "clip_grad",
        "fp32_groups_flat_partition",
        "mpu",
        "norm_type",
        "real_dp_process_group",
    )
    kind = type("BF16_Optimizer", (), dict.fromkeys(present))
    engine = SimpleNamespace(optimizer=kind(), **dict.fromkeys(compat.ENGINE_ATTRIBUTES))
    with pytest.raises(EnvironmentProblem, match=r"BF16_Optimizer\.fp32_groups_gradients_flat; install 'deepspeed"):
        compat.check_engine(engine)
