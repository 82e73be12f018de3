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


# Accelerate reads what `zeroaccel.checkpointing` has written.
READ = """
import sys, torch
from accelerate import PartialState
from accelerate.checkpointing import load_accelerator_state, load_custom_state
from tests.checkpoint.resume import Count, Net, Run, make_optimizer
PartialState(cpu=True)
model = Net(20)
optimizer = make_optimizer(Run(None, 1), model)
scaler = torch.amp.GradScaler("cpu")
print(load_accelerator_state(sys.argv[1], [model], [optimizer], [], [], 0, scaler, strict=False))
count = Count()
load_custom_state(count, sys.argv[1], 1)
print(count.value, scaler.state_dict()["scale"], float(torch.rand(())))
torch.save([model.state_dict(), optimizer.state_dict()], sys.argv[1] + "/read")
"""


def test_functions_for_single_files(tmp_path: Path) -> None:
    from zeroaccel import checkpointing

    training = Training(Run(None, 1))
    training.train(BEFORE)
    model, optimizer, count = training.model, training.optimizer, training.count
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    state = model.state_dict()
    folder = checkpointing.save_accelerator_state(tmp_path, [state], [optimizer], [], [], 0, 5, scaler)
    checkpointing.save_custom_state(count, folder, 1)
    drawn = float(torch.rand(()))

    kept = {name: value.clone() for name, value in state.items()}
    training.train(1)
    assert checkpointing.load_accelerator_state(folder, [model], [optimizer], [], [], 0, scaler) == {"step": 5}
    checkpointing.load_custom_state(count, folder, 1)
    assert float(torch.rand(())) == drawn
    assert count.value == BEFORE
    torch.testing.assert_close(dict(model.state_dict()), kept, rtol=0, atol=0)

    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path],
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n")[:2] == ["{'step': 5}", f"{BEFORE} 256.0 {drawn}"]
    theirs, moments = torch.load(tmp_path / "read")
    torch.testing.assert_close(dict(theirs), kept, rtol=0, atol=0)
    assert moments["state"][0]["step"] == BEFORE
    with pytest.raises(TypeError, match="map_location='gpu'"):
        checkpointing.load_accelerator_state(folder, [], [], [], [], 0, map_location="gpu")


def test_a_file_whose_reading_runs_code_is_loaded_only_if_the_script_says_so(tmp_path: Path) -> None:
    from zeroaccel import checkpointing

    training = Training(Run(None, 1))
    checkpointing.save_accelerator_state(tmp_path, [training.model.state_dict()], [training.optimizer], [], [], 0, 0)
    torch.save(training.scheduler.state_dict(), tmp_path / "scheduler.bin")
    torch.save({"value": Path("7")}, tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match=r'If you\s+trust it: load_state\(folder, load_kwargs={"weights_only"'):
        training.accelerator.load_state(tmp_path)
    training.accelerator.load_state(tmp_path, load_kwargs={"weights_only": False})
    assert str(training.count.value) == "7"


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
