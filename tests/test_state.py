from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from itertools import product
from typing import Any

import accelerate.state as theirs
import numpy
import pytest
import torch

from tests.distributed.pool import RankPool, reset_states
from zeroaccel import Accelerator
from zeroaccel.config.options import GradientAccumulationPlugin, InitProcessGroupKwargs
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.types import DistributedType
from zeroaccel.errors import ConfigError, ConfigTypeError
from zeroaccel.state import AcceleratorState, GradientState, PartialState
from zeroaccel.state.splitting import share_of


@pytest.fixture(autouse=True)
def fresh_states() -> None:
    reset_states()


def accelerator_state(**options: Any) -> AcceleratorState:
    return AcceleratorState(_from_accelerator=True, **options)


# --- one state for all --------------------------------------------------------------------------------------------


def test_all_instances_show_the_same() -> None:
    first = PartialState()
    first.debug = True
    assert PartialState().debug
    assert PartialState().__dict__ is PartialState._shared_state

    state = accelerator_state(mixed_precision="bf16")
    assert AcceleratorState().mixed_precision == "bf16"
    assert state.device == first.device
    assert state.is_main_process

    GradientState().plugin_kwargs["num_steps"] = 3
    assert GradientState().num_steps == 3


def test_a_reset_forgets_and_can_keep_the_processes() -> None:
    accelerator_state(mixed_precision="bf16")
    AcceleratorState._reset_state()
    assert AcceleratorState._shared_state == {}
    assert PartialState._shared_state != {}
    accelerator_state(mixed_precision="fp16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState._shared_state == {}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (PartialState, ["device", "is_main_process", "anything"]),
        (accelerator_state, ["device", "mixed_precision", "deepspeed_plugins", "num_processes"]),
        (GradientState, ["sync_gradients", "num_steps", "in_dataloader"]),
    ],
)
def test_reading_after_a_reset_says_what_to_do(make: Any, names: list[str]) -> None:
    state = make()
    reset_states()
    for name in names:
        with pytest.raises(AttributeError, match=r"its state was reset; create `Accelerator\(\)` again"):
            getattr(state, name)
    assert PartialState._shared_state == {}, "reading makes no state"


@pytest.mark.parametrize("make", [PartialState, accelerator_state, GradientState])
def test_an_attribute_that_never_was_is_an_ordinary_error(make: Any) -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'colour'$"):
        make().colour  # noqa: B018


def test_reading_the_configuration_before_there_is_an_accelerator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"create `accelerator = Accelerator\(\)` before reading it"):
        AcceleratorState()
    assert PartialState._shared_state == {}


def test_what_was_fixed_cannot_change() -> None:
    accelerator_state(mixed_precision="bf16")
    AcceleratorState(mixed_precision="bf16")
    with pytest.raises(ConfigError, match="mixed_precision='fp16' comes too late, the run has 'bf16': restart"):
        AcceleratorState(mixed_precision="fp16")


def test_a_configuration_that_fails_leaves_no_half_state() -> None:
    config = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    with pytest.raises(ConfigError):
        accelerator_state(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), mixed_precision="bf16")
    assert AcceleratorState._shared_state == {}
    assert accelerator_state().mixed_precision == "no"


def test_the_printed_state_names_processes_and_precision() -> None:
    assert str(PartialState()).splitlines()[:2] == ["Distributed environment: DistributedType.NO", "Num processes: 1"]
    assert "Mixed precision type: bf16" in str(accelerator_state(mixed_precision="bf16"))


# --- DeepSpeed ----------------------------------------------------------------------------------------------------


def states_of_plugins() -> None:
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 1}
    plugins = {"a": DeepSpeedPlugin(zero_stage=2), "b": DeepSpeedPlugin(hf_ds_config=config)}
    state = accelerator_state(deepspeed_plugin=plugins)
    assert state.distributed_type == PartialState().distributed_type == DistributedType.DEEPSPEED
    assert state.backend == "gloo"
    assert (state.deepspeed_plugin, state.mixed_precision) == (plugins["a"], "no")
    assert "ds_config: {" in str(state)
    assert "'stage': 2" in str(state)
    AcceleratorState().select_deepspeed_plugin("b")
    assert (state.deepspeed_plugin, state.mixed_precision) == (plugins["b"], "bf16")
    assert "'stage': 3" in str(state)
    assert state.get_deepspeed_plugin("a") is plugins["a"]
    for call in (state.get_deepspeed_plugin, state.select_deepspeed_plugin):
        with pytest.raises(ConfigError, match=r"no DeepSpeed plugin is called 'c'; there are \['a', 'b'\]"):
            call("c")


def test_the_state_shows_the_selected_plugin_and_its_config(ranks: RankPool) -> None:
    ranks.run(states_of_plugins)


def test_names_of_plugins_need_named_plugins() -> None:
    with pytest.raises(ConfigError, match="the run has no named plugins: pass"):
        accelerator_state().select_deepspeed_plugin("a")


# --- the process group --------------------------------------------------------------------------------------------


def ask_for_a_missing_backend() -> str:
    with pytest.raises(ConfigError) as error:
        PartialState(backend="mpi")  # no wheel of PyTorch has it
    assert PartialState._shared_state == {}
    return str(error.value)


def timeout_of_the_group() -> float:
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=77))])
    group: Any = torch.distributed.distributed_c10d._get_default_group()
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def ask_for_a_late_timeout() -> list[str]:
    PartialState()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zeroaccel.state.process").addHandler(handler)
    accelerator_state(timeout=timedelta(seconds=5))
    return messages


def test_options_of_the_process_group_reach_it_or_are_told_to_be_late() -> None:
    pool = RankPool(2)
    try:
        assert (
            pool.run(ask_for_a_missing_backend)
            == ["the backend 'mpi' is not available here; 'gloo' is what this device uses"] * 2
        )
        assert pool.run(timeout_of_the_group) == [77.0, 77.0]
        first, second = pool.run(ask_for_a_late_timeout)
        assert len(first) == 1
        assert "come too late, the process group exists already: pass them to the first" in first[0]
        assert second == [], "the main process speaks"
    finally:
        pool.close()


# --- some ranks only ----------------------------------------------------------------------------------------------


def decorated() -> dict[str, Any]:
    state = PartialState()

    def answer(number: int = 1) -> int:
        return number

    return {
        "main": state.on_main_process(answer)(2),
        "local main": state.on_local_main_process(answer)(),
        "last": state.on_last_process(answer)(),
        "process 1": state.on_process(answer, process_index=1)(),
        "process 0, as decorator": state.on_process(process_index=0)(answer)(number=3),
        "local process 1": state.on_local_process(local_process_index=1)(answer)(),
        "is": (state.is_main_process, state.is_local_main_process, state.is_last_process, state.use_distributed),
    }


def test_a_decorated_function_runs_on_its_rank_only(ranks: RankPool) -> None:
    assert ranks.run(decorated) == [
        {
            "main": 2,
            "local main": 1,
            "last": None,
            "process 1": None,
            "process 0, as decorator": 3,
            "local process 1": None,
            "is": (True, True, False, True),
        },
        {
            "main": None,
            "local main": None,
            "last": 1,
            "process 1": 1,
            "process 0, as decorator": None,
            "local process 1": 1,
            "is": (False, False, True, True),
        },
    ]


def test_alone_every_decorated_function_runs() -> None:
    assert decorated() == {
        "main": 2,
        "local main": 1,
        "last": 1,
        "process 1": 1,
        "process 0, as decorator": 3,
        "local process 1": 1,
        "is": (True, True, True, False),
    }


def go_first(path: str, local: bool) -> None:
    state = PartialState()
    with state.local_main_process_first() if local else state.main_process_first():
        if state.is_main_process:
            time.sleep(0.2)
            assert not os.path.exists(path)
            open(path, "w").close()
        else:
            assert os.path.exists(path)


@pytest.mark.parametrize("local", [False, True])
def test_rank_0_leaves_the_block_before_the_others_enter_it(ranks: RankPool, tmp_path: Any, local: bool) -> None:
    ranks.run(go_first, path=str(tmp_path / "made"), local=local)


def fail_first() -> str:
    state = PartialState()
    try:
        with state.main_process_first():
            if state.is_main_process:
                raise OSError("disk is full")
    except OSError as error:
        return str(error)
    return "went on"


def test_a_failure_of_rank_0_does_not_keep_the_others_waiting(ranks: RankPool) -> None:
    assert ranks.run(fail_first, timeout=20.0) == ["disk is full", "went on"]


def print_something(mark: str) -> None:
    PartialState().print(mark, flush=True)


def test_print_prints_once_a_node(ranks: RankPool) -> None:
    ranks.run(print_something, mark="printed by one rank")
    assert ranks.output().count("printed by one rank") == 1


# --- split_between_processes --------------------------------------------------------------------------------------

INPUTS: dict[str, Any] = {
    "list": lambda length: list(range(length)),
    "tuple": lambda length: tuple(range(length)),
    "tensor": lambda length: torch.arange(length),
    "matrix": lambda length: torch.arange(2 * length).view(length, 2),
    "dict": lambda length: {"x": list(range(length)), "y": torch.arange(length)},
}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


# Accelerate fails on padded tuples, and pads tensors by asking the other ranks.
@pytest.mark.parametrize(("kind", "padding"), [*((kind, False) for kind in INPUTS), ("list", True)])
def test_shares_are_those_of_accelerate(kind: str, padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for length, world in product(range(1, 10), (2, 3, 4)):
        for rank in range(world):
            ranks = {"num_processes": world, "process_index": rank}
            monkeypatch.setattr(theirs.PartialState, "_shared_state", ranks)
            inputs = INPUTS[kind](length)
            share = share_of(inputs, rank, world, padding)
            with theirs.PartialState().split_between_processes(inputs, apply_padding=padding) as expected:
                assert plain(share) == plain(expected), (length, ranks)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("list", [[0, 1], [2, 3], [3, 3]]),
        ("tuple", [(0, 1), (2, 3), (3, 3)]),
        ("tensor", [[0, 1], [2, 3], [3, 3]]),
        ("array", [[0, 1], [2, 3], [3, 3]]),
        ("matrix", [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[6, 7], [6, 7]]]),
        ("dict", [{"x": part, "y": part} for part in ([0, 1], [2, 3], [3, 3])]),
    ],
)
def test_padded_shares_repeat_the_last_element(kind: str, shares: list[Any]) -> None:
    inputs = {**INPUTS, "array": numpy.arange}[kind](4)
    found = [share_of(inputs, rank, 3, apply_padding=True) for rank in range(3)]
    assert all(type(share) is type(inputs) for share in found)
    assert [plain(share) for share in found] == shares


def test_a_range_is_split_and_a_text_is_not() -> None:
    assert [share_of(range(5), rank, 2) for rank in (0, 1)] == [[0, 1, 2], [3, 4]]
    assert [share_of("prompt", rank, 2) for rank in (0, 1)] == ["prompt", "prompt"]


def test_what_has_no_length_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigTypeError, match="cannot split a int, which has no length: pass a list"):
        share_of(5, 0, 2)


class Table:
    """Stands in for `datasets.Dataset`: has a length, and rows only through `select`."""

    def __len__(self) -> int:
        return 3

    def select(self, indices: list[int]) -> list[int]:
        return indices


@pytest.mark.parametrize(("padding", "shares"), [(False, [[0, 1], [2]]), (True, [[0, 1], [2, 2]])])
def test_a_dataset_selects_its_share(padding: bool, shares: list[list[int]]) -> None:
    assert [share_of(Table(), rank, 2, padding) for rank in (0, 1)] == shares


@pytest.mark.parametrize("padding", [False, True])
def test_nothing_is_shared_out_as_nothing(padding: bool) -> None:
    assert [share_of([], rank, 2, padding) for rank in (0, 1)] == [[], []]
    assert share_of({}, 0, 2, padding) == {}


def test_values_of_different_lengths_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match=r"values of one length in a dict, got \{'x': 2, 'y': 1\}"):
        share_of({"x": [1, 2], "y": [1]}, 0, 2)


def split_in_a_context() -> tuple[Any, Any]:
    inputs = {"x": ["a", "b", "c"]}
    with PartialState().split_between_processes(inputs, apply_padding=True) as share:
        return share, inputs


def test_each_rank_works_on_its_share_and_the_inputs_stay(ranks: RankPool) -> None:
    """Accelerate overwrites the values of a dict."""
    whole = {"x": ["a", "b", "c"]}
    assert ranks.run(split_in_a_context) == [({"x": ["a", "b"]}, whole), ({"x": ["c", "c"]}, whole)]


def test_alone_there_is_nothing_to_split() -> None:
    with PartialState().split_between_processes([1, 2, 3]) as share:
        assert share == [1, 2, 3]


# --- GradientState ------------------------------------------------------------------------------------------------


def test_the_accumulation_plugin_fills_the_gradient_state() -> None:
    state = GradientState()
    assert (state.num_steps, state.adjust_scheduler, state.sync_with_dataloader) == (1, False, True)
    GradientState(GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False))
    assert (state.num_steps, state.sync_with_dataloader) == (4, False)
    assert "'num_steps': 4" in str(state)


def test_assigning_sync_gradients_means_that_the_script_cuts_its_windows() -> None:
    state = GradientState()
    state._mirror_sync_gradients(False)
    assert (state.sync_gradients, state.script_cuts) == (False, False)
    state.sync_gradients = True
    assert (state.sync_gradients, state.script_cuts) == (True, True)
    GradientState._reset_state()
    GradientState()._set_sync_gradients(False)
    assert (GradientState().sync_gradients, GradientState().script_cuts) == (False, True)


def test_a_loader_that_is_gone_is_no_longer_active() -> None:
    class Loader:
        end_of_dataloader = True
        remainder = 2

    state = GradientState()
    loader = Loader()
    state._add_dataloader(loader)
    assert (state.active_dataloader, state.end_of_dataloader, state.remainder) == (loader, True, 2)
    assert state.dataloader_references == [None, loader]
    del loader
    assert state.dataloader_references == [None]
    assert not state.in_dataloader
