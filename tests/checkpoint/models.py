"""What the tests of checkpoints save: a model with everything that ZeRO keeps in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed.pool import device

FEATURES, CLASSES = 7, 11


class Everything(nn.Module):
    """Tied and frozen weights, a scalar, sizes that no number of ranks divides, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(FEATURES, FEATURES, bias=False)
        self.norm = nn.LayerNorm(FEATURES)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(FEATURES, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("average", torch.zeros(FEATURES))  # another one on every rank
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.norm(torch.tanh(self.hidden(self.frozen(x))))
        self.average.lerp_(x.detach().mean(0).to(self.average.dtype), 0.1)
        return self.head(x) * self.scale

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(tokens).float(), tokens.roll(1))


def everything() -> Everything:
    """The same weights at every call, on every rank."""
    torch.manual_seed(13)
    return Everything()


def tokens(rank: int = 0) -> torch.Tensor:
    """A batch of a rank."""
    return torch.randint(0, CLASSES, (8,), generator=torch.Generator().manual_seed(rank)).to(device())


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a prepared model, gathered by DeepSpeed's own means."""
    import deepspeed

    module = getattr(model, "module", model)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def trained(
    stage: int, offload: str = "none", precision: str = "no", steps: int = 2, split: bool = True, **plugin: Any
) -> Any:
    """An `Accelerator`, its prepared `Everything` and optimizer, some steps on.

    Args:
        stage, offload, precision: of ZeRO; "none" or "cpu"; "no", "bf16" or "fp16".
        steps: how many.
        split: whether stage 3 splits the small parameters too.
        plugin: further fields of the plugin.
    """
    from tests.engine.small import accelerator

    running = accelerator(
        options={"mixed_precision": precision},
        zero_stage=stage,
        offload_optimizer_device=offload,
        offload_param_device=offload if stage == 3 else "none",
        zero3_save_16bit_model=True,
        **plugin,
    )
    config = running.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 8
    if stage == 3 and offload == "nvme":  # DeepSpeed's own buffers are some GB, for each model that a rank prepares
        config["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    if split:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = everything()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = running.prepare(model, optimizer)
    for _ in range(steps):
        running.backward(F.cross_entropy(model(tokens(running.process_index)).float(), tokens().roll(1)))
        optimizer.step()
        optimizer.zero_grad()
    return running, model, optimizer
