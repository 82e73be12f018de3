"""`save_checkpoint` and `load_checkpoint` of the engine: right, or refused, where DeepSpeed is silently wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.resume import AFTER, BEFORE, Run, Training, difference
from tests.distributed.pool import RankPool
from zeroaccel.errors import CheckpointError, UnsupportedError, UsageError


def save_and_resume(run: Run, folder: str) -> float:
    """Largest difference of losses and learning rates after resuming by DeepSpeed's own means."""
    training = Training(run)
    training.train(BEFORE)
    scheduler = training.scheduler.state_dict()
    training.model.save_checkpoint(folder)
    shown = training.train(AFTER)
    resumed = Training(run, seed=2)
    resumed.model.load_checkpoint(folder)
    resumed.scheduler.load_state_dict(scheduler)
    resumed.step = BEFORE
    return difference(shown, resumed.train(AFTER))


@pytest.mark.parametrize(
    "run",
    [Run(0), Run(1), Run(2, offload="cpu"), Run(3, offload="cpu"), Run(2, precision="fp16"), Run(3, precision="bf16")],
    ids=str,
)
def test_a_run_goes_on_by_deepspeeds_own_means(ranks: RankPool, tmp_path: Path, run: Run) -> None:
    assert max(ranks.run(save_and_resume, run=run, folder=str(tmp_path))) < 1e-6


def refused(saved: Run, loaded: Run, folder: str, **options: Any) -> str:
    """What loading a folder of `saved` into `loaded` says."""
    training = Training(saved)
    training.train(1)
    training.model.save_checkpoint(folder, tag="first")
    training.model.save_checkpoint(folder, tag="second")
    training.accelerator.free_memory()
    other = Training(loaded, nvme_path=folder, seed=2)
    with pytest.raises((UnsupportedError, CheckpointError)) as caught:
        other.model.load_checkpoint(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("saved", "loaded", "options", "message"),
    [
        (Run(3), Run(3), {"load_module_only": True}, "loads nothing with load_module_only=True at stage 3"),
        (Run(3), Run(3), {"tag": "first", "load_optimizer_states": False}, r"names \(second\), not first"),
        (
            Run(2),
            Run(2, options=(("round_robin_gradients", True),)),
            {},
            "set round_robin_gradients to false in the DeepSpeed config",
        ),
        (Run(3), Run(3, offload="nvme"), {}, "loses step count and moments of an optimizer on NVMe"),
    ],
    ids=["module only", "another tag", "another order", "NVMe"],
)
def test_what_deepspeed_loads_silently_wrong_is_refused(
    ranks: RankPool, tmp_path: Path, saved: Run, loaded: Run, options: dict[str, Any], message: str
) -> None:
    one, other = ranks.run(refused, saved=saved, loaded=loaded, folder=str(tmp_path), **options)
    assert re.search(message, one), one
    assert one == other


def universal(stage: int) -> str:
    training = Training(Run(stage))
    training.model._config.load_universal_checkpoint = True
    with pytest.raises(UnsupportedError) as caught:
        training.model.load_checkpoint("/nowhere")
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_would_lose_frozen_parameters_and_buffers(ranks: RankPool, stage: int) -> None:
    for told in ranks.run(universal, stage=stage):
        assert "does not bring back frozen.weight, frozen.bias, passes, offset (frozen, or a buffer)" in told


def torn(folder: str, stage: int) -> str:
    """Rank 1's optimizer file is of an earlier step, as after a kill while the same tag was saved again."""
    training = Training(Run(stage))
    training.train(1)
    training.model.save_checkpoint(folder, tag="t")
    (own,) = Path(folder, "t").glob("*rank_1_*optim_states.pt")
    earlier = own.read_bytes()
    training.accelerator.wait_for_everyone()
    training.train(1)
    training.model.save_checkpoint(folder, tag="t")
    if training.accelerator.is_main_process:
        own.write_bytes(earlier)
    training.accelerator.wait_for_everyone()
    with pytest.raises(CheckpointError) as caught:
        training.model.load_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_different_steps_are_told(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    one, other = ranks.run(torn, folder=str(tmp_path), stage=stage)
    assert "are of different steps" in one
    assert "(2, 2.0) on rank 0, (2, 1.0) on rank 1" in one
    assert one == other


def kept(folder: str) -> tuple[Any, ...]:
    """Clipping of this run under a checkpoint of another, and an open window."""
    training = Training(Run(2, accumulation=2))
    training.train(1)
    with pytest.raises(UsageError, match=r"would lose the gradients of 1 micro-batches"):
        training.model.save_checkpoint(folder)
    training.train(1)
    training.model.optimizer.clip_grad = 7.0
    training.model.save_checkpoint(folder)
    training.accelerator.free_memory()
    other = Training(Run(2, accumulation=2), seed=2)
    before = other.model.optimizer.clip_grad
    other.train(1)
    other.model.load_checkpoint(folder)
    window = other.accelerator._backend.share(other.model).open_micro_batches()
    return before, other.model.optimizer.clip_grad, window


def test_clipping_stays_the_runs_own_and_open_windows_are_not_lost_silently(ranks: RankPool, tmp_path: Path) -> None:
    for before, clipping, window in ranks.run(kept, folder=str(tmp_path)):
        assert clipping == before
        assert window == 0


def scale(folder: str, stage: int) -> tuple[float, bool]:
    training = Training(Run(stage))
    training.train(2)
    training.model.save_checkpoint(folder)
    training.accelerator.free_memory()
    other = Training(replace(training.run, precision="fp16"), seed=2)
    other.model.load_checkpoint(folder)
    return float(other.model.optimizer.loss_scaler.cur_scale), torch.isfinite(torch.tensor(other.train(1)[0][0])).item()


@pytest.mark.parametrize("stage", [2, 3])
def test_an_fp16_run_keeps_its_loss_scale_over_a_checkpoint_in_fp32(
    ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    assert ranks.run(scale, folder=str(tmp_path), stage=stage) == [(2.0**8, True)] * 2
