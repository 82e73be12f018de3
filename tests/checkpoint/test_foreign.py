"""Folders that Accelerate and DeepSpeed wrote are loaded as they would load them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.resume import AFTER, BEFORE, Run, Training, difference
from tests.distributed.pool import RankPool
from zeroaccel.errors import CheckpointError

# In a process of its own: Accelerate would find our state in this one.
WRITE = """
import sys, torch
from accelerate import Accelerator
from tests.checkpoint.resume import Count, Net, Run, global_batch, make_optimizer
from torch.nn import functional as F
accelerator = Accelerator(cpu=True)
torch.manual_seed(1)
model = Net(20)
optimizer = make_optimizer(Run(None, 1), model)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 40))
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
count = Count()
accelerator.register_for_checkpointing(count)
for step in range(3):
    x, y = global_batch(step)
    accelerator.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    count.value += 1
accelerator.save_state(sys.argv[1], safe_serialization=sys.argv[2] == "safe")
"""


@pytest.mark.parametrize("how", ["safe", "pickled"])
def test_a_folder_of_accelerate_without_deepspeed(tmp_path: Path, how: str) -> None:
    folder = str(tmp_path)
    subprocess.run([sys.executable, "-c", WRITE, folder, how], check=True, timeout=120, cwd=Path(__file__).parents[2])
    went_on = Training(Run(None, 1))
    went_on.train(BEFORE)
    shown = went_on.train(AFTER)
    resumed = Training(Run(None, 1), seed=2)
    resumed.accelerator.load_state(folder)
    resumed.step = resumed.count.value
    assert difference(shown, resumed.train(AFTER)) < 1e-6
    (tmp_path / "custom_checkpoint_0.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl cannot be read"):
        resumed.accelerator.load_state(folder)


def write_and_read(folder: str, stage: int, accelerates: bool) -> float:
    """DeepSpeed's engine writes; under Accelerate's tag, with its files beside, or under its own."""
    training = Training(Run(stage))
    training.train(BEFORE)
    training.model.save_checkpoint(folder, tag="pytorch_model" if accelerates else None)
    if training.accelerator.is_main_process:
        torch.save(training.scheduler.state_dict(), f"{folder}/scheduler.bin")
        torch.save(training.count.state_dict(), f"{folder}/custom_checkpoint_0.pkl")
    training.accelerator.wait_for_everyone()
    shown = training.train(AFTER)
    resumed = Training(Run(stage), seed=2)
    resumed.accelerator.load_state(folder)
    resumed.step = resumed.count.value
    return difference(shown, resumed.train(AFTER))


@pytest.mark.parametrize(("stage", "accelerates"), [(2, True), (3, False), (0, True)])
def test_a_folder_of_deepspeeds_engine(ranks: RankPool, tmp_path: Path, stage: int, accelerates: bool) -> None:
    assert max(ranks.run(write_and_read, folder=str(tmp_path), stage=stage, accelerates=accelerates)) < 1e-6
