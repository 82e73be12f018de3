"""A resumed run shows the losses and learning rates of the one that went on, wherever it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoint import resume
from tests.checkpoint.resume import Run
from tests.distributed.pool import RankPool

# Losses and rates: rounding of another order of sums in fp32; of 16-bit weights where the precision changes.
SAME, ROUNDED = 1e-6, 1e-2

ROUND_ROBIN = (("round_robin_gradients", True),)
SUB_GROUPS = (("sub_group_size", 300),)
NVME = 600  # width from which optimizer states really go to the disk

# saved -> resumed as
CASES: list[tuple[Run, list[Run]]] = [
    (Run(2), [Run(2), Run(0), Run(3), Run(2, options=ROUND_ROBIN), Run(2, 1), Run(None, 1), Run(3, offload="cpu")]),
    (Run(3), [Run(3), Run(1), Run(3, options=SUB_GROUPS), Run(3, 1), Run(3, offload="cpu+param")]),
    (Run(0), [Run(0), Run(1), Run(2), Run(3)]),
    (Run(None, 1), [Run(None, 1), Run(3)]),
    (Run(2, offload="cpu"), [Run(2, offload="cpu"), Run(2), Run(0)]),
    (Run(2, options=ROUND_ROBIN), [Run(2, options=ROUND_ROBIN), Run(1)]),
    (Run(2, precision="bf16"), [Run(2, precision="bf16"), Run(0, precision="bf16"), Run(3), Run(1, precision="fp16")]),
    (Run(3, precision="fp16"), [Run(3, precision="fp16"), Run(0, precision="fp16"), Run(2, precision="bf16")]),
    (Run(3), [Run(3, precision="bf16")]),
    (Run(2, optimizer="SGD"), [Run(3, optimizer="SGD"), Run(0, optimizer="SGD")]),
    (Run(1, optimizer="Adagrad"), [Run(3, optimizer="Adagrad"), Run(2, offload="cpu", optimizer="Adagrad")]),
    (
        Run(3, offload="nvme", hidden=NVME),
        [Run(3, offload="nvme", hidden=NVME), Run(2, hidden=NVME), Run(3, offload="cpu", hidden=NVME)],
    ),
    (Run(2, offload="cpu", hidden=NVME), [Run(3, offload="nvme", hidden=NVME)]),
    (Run(0, hidden=NVME), [Run(3, offload="nvme+param", hidden=NVME)]),
]
# Saved in the middle of a window: after three micro-batches of two, or four, a step.
OPEN = [
    *(Run(stage, accumulation=2) for stage in (None, 0, 1, 2, 3)),
    *(Run(stage, accumulation=4, precision="bf16") for stage in (0, 1, 2, 3)),
    *(Run(stage, accumulation=2, offload="cpu") for stage in (1, 2, 3)),
    Run(2, accumulation=4, precision="fp16"),
    Run(2, accumulation=2, offload="cpu", precision="bf16"),
]

STAGES = (0, 1, 2, 3)
EVERYWHERE = [
    *(Run(stage, ranks) for stage in STAGES for ranks in (1, 2, 3, 4)),
    *(Run(stage, offload="cpu") for stage in (1, 2, 3)),
    *(Run(stage, precision=precision) for stage in STAGES for precision in ("bf16", "fp16")),
    Run(3, offload="cpu+param"),
    Run(2, offload="cpu", precision="bf16"),
    Run(3, offload="cpu", precision="fp16"),
    Run(2, options=ROUND_ROBIN),
    Run(3, options=SUB_GROUPS),
    Run(None, 1),
]
FROM = [Run(stage) for stage in STAGES] + [Run(1, 3), Run(3, 3), Run(2, precision="bf16"), Run(3, precision="fp16")]
FROM += [Run(2, offload="cpu"), Run(3, offload="cpu", precision="bf16"), Run(None, 1), Run(2, options=ROUND_ROBIN)]


class Pools:
    """Ranks by number, two of them those that other tests use."""

    def __init__(self, two: RankPool) -> None:
        self._pools = {2: two}

    def __getitem__(self, world_size: int) -> RankPool:
        return self._pools.setdefault(world_size, RankPool(world_size))

    def close(self) -> None:
        for world_size, pool in self._pools.items():
            if world_size != 2:
                pool.close()


@pytest.fixture(scope="module")
def pools(ranks: RankPool) -> Iterator[Pools]:
    pools = Pools(ranks)
    yield pools
    pools.close()


def tolerance(saved: Run, resumed: Run) -> float:
    if saved.precision != resumed.precision:
        return ROUNDED
    return SAME if saved.precision == "no" or saved.ranks == resumed.ranks else ROUNDED


def differences(pools: Pools, saved: Run, everywhere: list[Run], folder: Path, used: bool = False) -> dict[str, float]:
    """What the run shows beyond its checkpoint, against every one that resumes it."""
    names = ["checkpoint", "saved", "resumed"]
    checkpoint, nvme, other = (str(folder / name) for name in names)
    shown = pools[saved.ranks].run(resume.save_and_go_on, run=saved, folder=checkpoint, nvme_path=nvme)[0]
    found = {}
    for run in everywhere:
        again = pools[run.ranks].run(resume.resume, run=run, folder=checkpoint, nvme_path=other, used=used)[0]
        found[str(run)] = resume.difference(shown, again) / tolerance(saved, run)
    return found


@pytest.mark.parametrize(("saved", "resumed"), CASES, ids=[str(saved) for saved, _ in CASES])
def test_a_run_goes_on_where_it_was_saved(pools: Pools, saved: Run, resumed: list[Run], tmp_path: Path) -> None:
    found = differences(pools, saved, resumed, tmp_path)
    assert {name: ratio for name, ratio in found.items() if ratio > 1} == {}


def test_what_the_run_that_loads_has_done_before_is_forgotten(pools: Pools, tmp_path: Path) -> None:
    found = differences(pools, Run(3), [Run(3), Run(0), Run(2, offload="cpu")], tmp_path, used=True)
    assert {name: ratio for name, ratio in found.items() if ratio > 1} == {}


@pytest.mark.parametrize("run", OPEN, ids=str)
def test_an_open_accumulation_window_goes_on(pools: Pools, run: Run, tmp_path: Path) -> None:
    run = run if run.stage is not None else replace(run, ranks=1)
    found = differences(pools, run, [run], tmp_path)
    assert {name: ratio for name, ratio in found.items() if ratio > 1} == {}


@pytest.mark.parametrize("run", [Run(stage, accumulation=2) for stage in STAGES], ids=str)
def test_an_open_window_goes_on_in_a_run_that_has_stepped(pools: Pools, run: Run, tmp_path: Path) -> None:
    found = differences(pools, run, [run], tmp_path, used=True)
    assert {name: ratio for name, ratio in found.items() if ratio > 1} == {}


def test_an_open_window_of_another_kind_of_run_is_refused(pools: Pools, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    pools[2].run(resume.save_and_go_on, run=Run(2, accumulation=2), folder=folder)
    with pytest.raises(AssertionError, match=r"1 micro-batches wait for their optimizer step, with gradients .* save"):
        pools[2].run(resume.resume, run=Run(3, accumulation=2), folder=folder)


def test_the_comparison_can_fail(pools: Pools, tmp_path: Path) -> None:
    """A run whose optimizer state is not loaded differs by far more than what is tolerated."""
    folder = str(tmp_path / "checkpoint")
    shown = pools[2].run(resume.save_and_go_on, run=Run(2), folder=folder)[0]
    without = pools[2].run(resume.resume, run=Run(2), folder=folder, load_optimizer_states=False)[0]
    assert resume.difference(shown, without) > 100 * SAME


@pytest.mark.full
@pytest.mark.parametrize("saved", FROM, ids=str)
def test_from_anywhere_to_anywhere(pools: Pools, saved: Run, tmp_path: Path) -> None:
    found = differences(pools, saved, EVERYWHERE, tmp_path)
    assert {name: ratio for name, ratio in found.items() if ratio > 1} == {}
