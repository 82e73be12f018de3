"""What the tests of `prepare()` prepare: a model of two layers, its loader, and an `Accelerator` for either."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES = 8


class Net(nn.Module):
    """A regression. `config` is what `auto` fields ask for."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.last = nn.Linear(16, 1)
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def net() -> Net:
    """The same weights at every call, on every rank."""
    torch.manual_seed(3)
    return Net()


def samples(count: int = 64) -> TensorDataset:
    """`count` inputs."""
    return TensorDataset(torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(5)))


def loader(batch_size: int | None = 4, count: int = 64, **options: Any) -> DataLoader[Any]:
    """A loader of `samples`."""
    return DataLoader(samples(count), batch_size=batch_size, **options)


def accelerator(config: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **plugin: Any) -> Any:
    """A new `Accelerator`, as in a new process.

    Args:
        config: the DeepSpeed config; None: from the plugin's fields.
        options: arguments of the `Accelerator`.
        plugin: fields of the `DeepSpeedPlugin`.
    """
    from tests.distributed.pool import reset_states
    from zeroaccel import Accelerator, DeepSpeedPlugin

    reset_states()
    if config is not None:
        plugin["hf_ds_config"] = config
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(**plugin), **(options or {}))


def train_step(accelerator: Any, model: Any, optimizer: Any, x: torch.Tensor) -> None:
    """Backward and step on one batch."""
    accelerator.backward(model(x).float().pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()
