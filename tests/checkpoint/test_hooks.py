"""What a hook is given instead of a model's weights: nothing is gathered before it is looked into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.resume import Run, Training
from tests.distributed.pool import RankPool
from zeroaccel.checkpoint import manifest
from zeroaccel.checkpoint.hooks import LazyWeights
from zeroaccel.errors import CheckpointError


def lazy() -> tuple[LazyWeights, list[int]]:
    gathered: list[int] = []

    def gather() -> dict[str, Any]:
        gathered.append(1)
        return {"a": torch.ones(2), "b": torch.zeros(3)}

    return LazyWeights(gather), gathered


def test_what_scripts_do_to_the_list_gathers_nothing() -> None:
    one, gathered = lazy()
    weights = [one]
    assert weights
    assert weights[0]
    assert "not gathered yet" in repr(weights)
    weights.pop()
    weights.clear()
    assert gathered == []


@pytest.mark.parametrize(
    "look",
    [
        lambda w: w["a"],
        lambda w: dict(w)["a"],
        lambda w: {**w}["a"],
        lambda w: w.copy()["a"],
        lambda w: next(iter(w.values())),
        lambda w: [value for name, value in w.items() if name == "a"][0],  # noqa: RUF015
        lambda w: w.pop("a"),
        lambda w: ({} | w)["a"],
        lambda w: w.get("a"),
        lambda w: len(w) == 2 and "a" in w and sorted(w) == ["a", "b"] and torch.ones(2),
    ],
)
def test_who_looks_finds_a_dictionary(look: Any) -> None:
    weights, gathered = lazy()
    assert torch.equal(look(weights), torch.ones(2))
    assert gathered == [1]


def test_it_can_be_changed_and_written(tmp_path: Path) -> None:
    for write, read in [
        (lambda w: torch.save(w, tmp_path / "w.bin"), lambda: torch.load(tmp_path / "w.bin", weights_only=True)),
        (lambda w: save_file(w, tmp_path / "w.safetensors"), lambda: load_file(tmp_path / "w.safetensors")),
    ]:
        weights, _ = lazy()
        del weights["b"]
        weights["c"] = torch.arange(2)
        write(weights)
        assert sorted(read()) == ["a", "c"]


def at_stage_3(folder: str) -> list[int]:
    """Reads, without the flag that allows `get_state_dict`; sizes of what the hook got."""
    training = Training(Run(3))
    sizes: list[int] = []

    def hook(models: list[Any], weights: list[Any], output_dir: str) -> None:
        sizes.extend(tensor.numel() for tensor in weights.pop().values())

    training.accelerator.register_save_state_pre_hook(hook)
    training.accelerator.save_state(folder)
    return sizes


def test_at_stage_3_rank_0_gets_whole_tensors(ranks: RankPool, tmp_path: Path) -> None:
    first, other = ranks.run(at_stage_3, folder=str(tmp_path))
    assert len(first) == 13
    assert min(first) >= 1
    assert other == []


def fails(folder: str, which: str) -> list[str]:
    """A hook that cannot write on rank 0; the older checkpoint goes on to load."""
    training = Training(Run(2))
    accelerator = training.accelerator
    accelerator.save_state(folder)

    def hook(*arguments: Any) -> None:
        if accelerator.is_main_process:
            open(os.path.join(folder, "no", "such.file"), "w").close()

    handle = getattr(accelerator, f"register_{which}_state_pre_hook")(hook)
    with pytest.raises(CheckpointError) as caught:
        getattr(accelerator, f"{which}_state")(folder)
    handle.remove()
    accelerator.load_state(folder)
    return [str(caught.value)]


@pytest.mark.parametrize("which", ["save", "load"])
def test_a_hook_that_fails_on_one_rank_is_an_error_on_all(ranks: RankPool, tmp_path: Path, which: str) -> None:
    one, other = ranks.run(fails, folder=str(tmp_path), which=which, timeout=40)
    assert one == other
    assert "the hooks before" in one[0]
    assert "rank 0: FileNotFoundError" in one[0]
    assert manifest.is_complete(str(tmp_path))
