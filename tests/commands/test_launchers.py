"""A script with the plugin in its code trains the same under every launcher: one ZeRO-2 step on two CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands.runs import PROGRAMS, SCRIPTS, ZEROACCEL_LAUNCH, reports, run
from tests.commands.scripts import train
from tests.distributed.pool import free_port

# What is typed before the script. Accelerate refuses --cpu beside --use_deepspeed: the script says cpu=True.
LAUNCHERS = {
    "zeroaccel launch": (*ZEROACCEL_LAUNCH, "--cpu", "--num_processes", "2", "--gradient_clipping", "100"),
    "torchrun": (str(PROGRAMS / "torchrun"), "--standalone", "--nproc_per_node", "2"),
    "deepspeed": (str(PROGRAMS / "deepspeed"), "--num_accelerators", "2", "--master_port"),
    "accelerate launch": (
        *(str(PROGRAMS / "accelerate"), "launch", "--num_processes", "2", "--main_process_port", "0"),
        *("--use_deepspeed", "--zero_stage", "1", "--gradient_clipping", "100"),
    ),
}
# The script leaves clipping to the launcher's variables: ZEROACCEL_ or, as a fallback, ACCELERATE_.
CLIPPING = {"zeroaccel launch": 100.0, "accelerate launch": 100.0}


def reference() -> list[list[float]]:
    """Weights after one step of plain PyTorch on the batch of both ranks."""
    model, dataset, optimizer = train.make_problem(world_size=2)
    train.loss_of(model, *dataset.tensors).backward()
    optimizer.step()
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_same_script_trains_to_the_same_weights_under(name: str, tmp_path: Path) -> None:
    command = LAUNCHERS[name] + ((str(free_port()),) if name == "deepspeed" else ())
    variables = {"DS_ACCELERATOR": "cpu", "HF_HOME": str(tmp_path)}  # no config file of this user's
    result = run((*command, str(SCRIPTS / "train.py"), str(tmp_path)), tmp_path, **variables)
    assert result.status == 0, result.err
    first, second = reports(tmp_path)
    assert first == second
    assert (first["engine"], first["world_size"], first["steps"]) == ("DeepSpeedEngine", 2, 1)
    assert (first["stage"], first["gradient_clipping"]) == (2, CLIPPING.get(name, 0.0))
    for ours, theirs in zip(first["weights"], reference(), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
