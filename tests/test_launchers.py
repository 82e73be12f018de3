"""Functions that are started on real ranks, forks of this process."""

from __future__ import annotations

import inspect
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from zeroaccel import debug_launcher, notebook_launcher
from zeroaccel.distributed.operations import gather
from zeroaccel.errors import ConfigError, DistributedError, UsageError
from zeroaccel.launchers import PrepareForLaunch, get_free_port, is_port_in_use
from zeroaccel.state import AcceleratorState, PartialState


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, without a state; what a process group writes into the environment is undone."""
    before = dict(os.environ)
    monkeypatch.setenv("ZEROACCEL_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    os.environ.clear()
    os.environ.update(before)


def _report(folder: Path, start: int) -> None:
    """Each rank writes what it is and what a collective gave."""
    state = PartialState()
    gathered = gather(torch.tensor([start + state.process_index])).tolist()
    mixed_precision = AcceleratorState(_from_accelerator=True).mixed_precision
    ranks = [state.num_processes, state.local_process_index, state.fork_launched]
    words = [gathered, *ranks, str(state.device), mixed_precision]
    (folder / f"rank{state.process_index}").write_text(repr(words))


def _reports(folder: Path) -> list[Any]:
    return [eval(path.read_text()) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("launcher", [debug_launcher, notebook_launcher])
def test_launchers_take_accelerates_arguments(launcher: Any) -> None:
    theirs = inspect.signature(getattr(accelerate, launcher.__name__)).parameters.values()
    mine = inspect.signature(launcher).parameters.values()
    assert [(each.name, each.kind, each.default) for each in mine] == [
        (each.name, each.kind, each.default) for each in theirs
    ]


def test_debug_launcher_runs_ranks_that_talk_to_each_other(tmp_path: Path) -> None:
    environment = dict(os.environ)
    debug_launcher(_report, (tmp_path, 5), num_processes=2)
    assert _reports(tmp_path) == [[[5, 6], 2, rank, True, "cpu", "no"] for rank in (0, 1)]
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()


def test_debug_launcher_starts_afresh_where_this_process_has_a_state(tmp_path: Path) -> None:
    AcceleratorState(_from_accelerator=True)
    debug_launcher(_report, (tmp_path, 0))
    assert [report[:2] for report in _reports(tmp_path)] == [[[0, 1], 2], [[0, 1], 2]]


def test_ranks_compute_though_this_process_used_its_threads(tmp_path: Path) -> None:
    big = torch.ones(2000, 2000)

    def multiply() -> None:
        (tmp_path / f"rank{PartialState().process_index}").write_text(repr(float((big @ big)[0, 0])))

    multiply_here = float((big @ big)[0, 0])
    debug_launcher(multiply)
    assert _reports(tmp_path) == [multiply_here, multiply_here]


def _fail_on_last_rank(text: str) -> None:
    if PartialState().is_last_process:
        raise ValueError(text)


def test_a_rank_that_raises_ends_the_launch_with_its_traceback() -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)_fail_on_last_rank.*ValueError: wrong batch"):
        debug_launcher(_fail_on_last_rank, ("wrong batch",))
    with pytest.raises(DistributedError, match=r"(?s)rank 1 of _fail_on_last_rank failed.*ValueError: wrong batch"):
        notebook_launcher(_fail_on_last_rank, ("wrong batch",), num_processes=2)


def _die_on_last_rank() -> None:
    if PartialState().is_last_process:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    with pytest.raises(DistributedError, match=r"rank 1 of _die_on_last_rank failed:\s.*[Ss]ignal 9.*SIGKILL"):
        notebook_launcher(_die_on_last_rank, num_processes=2)


def test_notebook_launcher_runs_ranks_with_the_precision_asked_for(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        notebook_launcher(
            _report, (tmp_path, 5), num_processes=2, mixed_precision="bf16", use_port=str(taken.getsockname()[1])
        )
    assert _reports(tmp_path) == [[[5, 6], 2, rank, True, "cpu", "bf16"] for rank in (0, 1)]


def test_notebook_launcher_runs_a_single_process_right_here() -> None:
    seen = []
    notebook_launcher(lambda *args: seen.append((os.getpid(), args)), (1, 2), num_processes=1)
    assert seen == [(os.getpid(), (1, 2))]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mixed_precision": "fp12"}, "mixed_precision='fp12' is unknown: choose from"),
        ({"node_rank": 2, "num_nodes": 2}, "node_rank=2 does not exist: 2 node"),
    ],
)
def test_notebook_launcher_refuses_what_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        notebook_launcher(print, num_processes=2, **options)


def test_notebook_launcher_refuses_an_accelerator_outside_the_function() -> None:
    AcceleratorState(_from_accelerator=True)
    with pytest.raises(UsageError, match="create it inside the function"):
        notebook_launcher(print, num_processes=2)


def test_launchers_refuse_a_process_group_that_forks_cannot_use() -> None:
    PartialState().start_process_group()
    for launch in (debug_launcher, notebook_launcher):
        with pytest.raises(UsageError, match=f"{launch.__name__} forks this process, which has a process group"):
            launch(print, num_processes=2)
    torch.distributed.destroy_process_group()


def test_prepare_for_launch_sets_the_rank_on_this_node_and_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def look(word: str) -> None:
        seen.append((word, os.environ.get("RANK"), os.environ.get("LOCAL_RANK")))

    monkeypatch.setenv("NPROC", "4")
    monkeypatch.setenv("NODE_RANK", "2")
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    PrepareForLaunch(look, distributed_type="MULTI_GPU")(1, "several")
    PrepareForLaunch(look)(1, "alone")
    torch.set_num_threads(threads)
    assert seen == [("several", "9", "1"), ("alone", None, None)]


def test_ports_in_use_are_seen_and_free_ones_are_free() -> None:
    port = get_free_port()
    assert not is_port_in_use(port)
    with socket.socket() as listener:
        listener.bind(("localhost", port))
        listener.listen()
        assert is_port_in_use(port)
