"""One optimizer step with the plugin in the code: `train.py [--local_rank=N] FOLDER`; each rank writes its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zeroaccel import Accelerator, DeepSpeedPlugin

MICRO_BATCH = 4


def make_problem(world_size: int) -> tuple[nn.Module, TensorDataset, torch.optim.Optimizer]:
    """A model, a micro-batch for each rank, an optimizer: the same at every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    dataset = TensorDataset(torch.randn(MICRO_BATCH * world_size, 4), torch.randn(MICRO_BATCH * world_size, 2))
    return model, dataset, torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean square error."""
    return nn.functional.mse_loss(model(x), y)


def main(folder: str) -> None:
    """Trains and writes `rank<N>.json`."""
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    model, dataset, optimizer = make_problem(accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_size=MICRO_BATCH))
    for x, y in loader:
        accelerator.backward(loss_of(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    plugin = accelerator.deepspeed_plugin
    assert plugin is not None
    report = {
        "world_size": accelerator.num_processes,
        "engine": type(model).__name__,
        "stage": model.zero_optimization_stage(),
        "gradient_clipping": plugin.gradient_clipping,
        "steps": model.global_steps,
        "weights": [parameter.detach().flatten().tolist() for parameter in model.module.parameters()],
    }
    Path(folder, f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[-1])
