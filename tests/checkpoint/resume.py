"""A training run that is saved, and goes on elsewhere: on other ranks, another ZeRO stage, offload, precision.

What ranks see of a global batch depends on their number, the mean loss over all of them does not: so a resumed run must
show the losses and learning rates of the one that went on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FEATURES = 24
GLOBAL_BATCH = 24
BEFORE, AFTER = 3, 4  # steps


@dataclass(frozen=True)
class Run:
    """A way to run.

    Attributes:
        stage: ZeRO stage; None: plain PyTorch.
        ranks: world size.
        offload: "none", "cpu", "cpu+param", "nvme" or "nvme+param".
        precision: "no", "bf16" or "fp16".
        optimizer: name in torch.optim.
        options: more of the DeepSpeed config's `zero_optimization`.
        hidden: width of the model.
        accumulation: micro-batches of an optimizer step.
    """

    stage: int | None = 2
    ranks: int = 2
    offload: str = "none"
    precision: str = "no"
    optimizer: str = "AdamW"
    options: tuple[tuple[str, Any], ...] = ()
    hidden: int = 20
    accumulation: int = 1

    def __str__(self) -> str:
        shown = ["plain" if self.stage is None else f"stage{self.stage}", f"{self.ranks}ranks"]
        shown += [self.offload] * (self.offload != "none") + [self.precision] * (self.precision != "no")
        shown += [f"x{self.accumulation}"] * (self.accumulation > 1)
        shown += [self.optimizer] * (self.optimizer != "AdamW") + [f"{name}={value}" for name, value in self.options]
        return "-".join(shown)


class Net(nn.Module):
    """What checkpoints must not lose: sizes that no number of ranks divides, frozen and tied weights, buffers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.frozen = nn.Linear(hidden, hidden)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(hidden, hidden, bias=False)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.again.weight = self.tied.weight
        self.norm = nn.LayerNorm(hidden)
        self.scale = nn.Parameter(torch.ones(()))
        self.last = nn.Linear(hidden, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("offset", torch.linspace(-1, 1, hidden))
        self.register_buffer("passing", torch.ones(hidden), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.passes, torch.Tensor)
        if self.training:
            self.passes += 1
        dtype = self.first.weight.dtype
        x = torch.tanh(self.first(x.to(dtype)) + (self.offset * 1e-2 * self.passes).to(dtype))
        x = x + torch.tanh(self.frozen(self.tied(x)))
        x = self.norm(self.again(torch.tanh(x))) * self.scale
        return self.last(x * self.passing.to(dtype))


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all ranks together see in a step."""
    x = torch.randn(GLOBAL_BATCH, FEATURES, generator=torch.Generator().manual_seed(100 + step))
    return x, (x[:, :3] * 2 + x[:, 3:6]).argmax(dim=1)


def make_optimizer(run: Run, model: Net) -> torch.optim.Optimizer:
    """Two groups with rates of their own."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    options: dict[str, Any] = {"lr": 1e-2}
    if run.optimizer in ("Adam", "AdamW"):
        options.update(eps=1e-3, betas=(0.8, 0.95))
    if run.optimizer == "SGD":
        options.update(momentum=0.9)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-2, "weight_decay": 0.0}]
    return getattr(torch.optim, run.optimizer)(groups, **options)


class Training:
    """Prepared objects of a run, and their loop.

    Args:
        run: how.
        nvme_path: folder for what is offloaded to NVMe.
        seed: of the initial weights.
        options: arguments of the `Accelerator`.
    """

    def __init__(self, run: Run, nvme_path: str = "", seed: int = 1, **options: Any) -> None:
        from tests.distributed.pool import reset_states
        from zeroaccel import Accelerator

        reset_states()
        self.run = run
        plugin = None if run.stage is None else self._plugin(run, nvme_path)
        self.accelerator = Accelerator(
            mixed_precision=run.precision,
            deepspeed_plugin=plugin,
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_steps=run.accumulation,
            **options,
        )
        torch.manual_seed(seed)
        model = Net(run.hidden)
        optimizer = make_optimizer(run, model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 40))
        self.accelerator.step_scheduler_with_optimizer = False
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.scheduler.step_with_optimizer = False  # else it would count processes, which differ
        self.count = Count()
        self.accelerator.register_for_checkpointing(self.count)
        self.step = 0

    def _plugin(self, run: Run, nvme_path: str) -> Any:
        from zeroaccel import DeepSpeedPlugin

        device, _, parameters = run.offload.partition("+")
        on_disk = {"nvme_path": nvme_path} if device == "nvme" else {}
        zero: dict[str, Any] = {"stage": run.stage, **dict(run.options)}
        if device != "none":
            zero["offload_optimizer"] = {"device": device, **on_disk}
        if parameters:
            zero["offload_param"] = {"device": device, **on_disk}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // run.ranks,
            "gradient_accumulation_steps": run.accumulation,
            "zero_optimization": zero,
        }
        if run.precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}
        return DeepSpeedPlugin(hf_ds_config=config)

    def train(self, steps: int) -> list[tuple[float, list[float]]]:
        """Mean loss over all ranks and the learning rates, of each micro-batch."""
        shown = []
        for _ in range(steps):
            x, y = (part.to(self.accelerator.device) for part in global_batch(self.step))
            own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
            loss = F.cross_entropy(self.model(x[own]).float(), y[own])
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.count.value += 1
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            shown.append((float(self.accelerator.reduce(loss.detach(), reduction="mean")), rates))
        return shown


class Count:
    """An object of the script."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def save_and_go_on(run: Run, folder: str, nvme_path: str = "") -> list[tuple[float, list[float]]]:
    """Trains, saves twice into one folder, trains on; what the rest showed."""
    training = Training(run, nvme_path)
    training.train(1)
    training.accelerator.save_state(folder)
    training.train(BEFORE - 1)
    training.accelerator.save_state(folder)
    shown = training.train(AFTER)
    training.accelerator.free_memory()
    return shown


def resume(
    run: Run, folder: str, nvme_path: str = "", used: bool = False, **options: Any
) -> list[tuple[float, list[float]]]:
    """Loads over other weights, perhaps of a run that has trained already, and trains on."""
    training = Training(run, nvme_path, seed=2)
    if used:
        training.train(2)
    training.accelerator.load_state(folder, **options)
    training.step = training.count.value
    assert training.step == BEFORE
    shown = training.train(AFTER)
    training.accelerator.free_memory()
    return shown


def difference(one: list[tuple[float, list[float]]], other: list[tuple[float, list[float]]]) -> float:
    """Largest difference of losses and learning rates."""
    assert len(one) == len(other)
    return max(
        max(abs(a - b) for a, b in zip([loss, *rates], [loss2, *rates2], strict=True))
        for (loss, rates), (loss2, rates2) in zip(one, other, strict=True)
    )
