"""One small training problem, solved by plain PyTorch in one process and by the library on several ranks.

The reference sees the batches of all ranks concatenated, so its weights are what every ZeRO stage must arrive at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

MICRO_BATCH = 4
WORLD_SIZE = 2
FEATURES = 12


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        stage: ZeRO stage.
        offload: "none", "cpu", "cpu+param", "nvme" or "nvme+param".
        accumulation: micro-batches of an optimizer step.
        precision: "no", "bf16" or "fp16".
        cut: who cuts the windows: "accumulate", "library" or "script".
        config_clipping: `gradient_clipping` of the plugin, None for absent.
        call_clipping: max_norm given to `clip_grad_norm_`, None for no call.
        optimizer: name in torch.optim.
        groups: three param groups with their own lr and weight decay, and a frozen layer.
        micro_batches: batches that each rank sees.
        config_file: the accumulation is a number in a DeepSpeed config, and the Accelerator says another one.
    """

    stage: int = 2
    offload: str = "none"
    accumulation: int = 1
    precision: str = "no"
    cut: str = "accumulate"
    config_clipping: float | None = None
    call_clipping: float | None = None
    optimizer: str = "AdamW"
    groups: bool = False
    micro_batches: int = 20
    config_file: bool = False

    def __str__(self) -> str:
        shown = [f"stage{self.stage}", self.offload, f"x{self.accumulation}", self.precision, self.cut]
        if self.config_clipping is not None:
            shown.append(f"config-clip{self.config_clipping:g}")
        if self.call_clipping is not None:
            shown.append(f"call-clip{self.call_clipping:g}")
        shown += [self.optimizer] * (self.optimizer != "AdamW") + ["groups"] * self.groups
        shown += ["config-file"] * self.config_file
        return "-".join(shown)


class Net(nn.Module):
    """Embedding-free, but with what ZeRO treats differently: a big matrix, small vectors, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.norm = nn.LayerNorm(32)
        self.hidden = nn.Linear(32, 32, bias=False)
        self.last = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype))))
        return self.last(x + torch.tanh(self.hidden(x)))


def make_model(case: Case) -> Net:
    """The same weights at every call."""
    torch.manual_seed(7)
    model = Net()
    if case.groups:
        model.norm.requires_grad_(False)
    return model


def make_dataset(case: Case) -> TensorDataset:
    """`micro_batches` batches for every rank."""
    generator = torch.Generator().manual_seed(11)
    count = case.micro_batches * MICRO_BATCH * WORLD_SIZE
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, :3] * 2 + x[:, 3:6]).argmax(dim=1))


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """The case's optimizer; epsilon is large enough that rounding is not amplified."""
    options: dict[str, Any] = {"lr": 1e-2}
    if case.optimizer in ("AdamW", "Adam", "NAdam"):
        options.update(eps=1e-3, betas=(0.8, 0.95))
    if case.optimizer == "SGD":
        options.update(momentum=0.9, nesterov=True, lr=5e-2)
    parameters: Any = [p for p in model.parameters() if p.requires_grad]
    if case.groups:
        assert isinstance(model, Net)
        parameters = [
            {"params": [model.first.weight, model.hidden.weight], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [model.first.bias, model.last.bias], "lr": 3e-2, "weight_decay": 0.0},
            {"params": [model.last.weight], "lr": 5e-3, "weight_decay": 0.3},
            {"params": list(model.norm.parameters()), "lr": 1.0},  # frozen
        ]
    return getattr(torch.optim, case.optimizer)(parameters, **options)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over the batch, in fp32."""
    return F.cross_entropy(model(x).float(), y)


def global_batches(case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of all ranks concatenated."""
    yield from DataLoader(make_dataset(case), batch_size=MICRO_BATCH * WORLD_SIZE)


@dataclass
class Outcome:
    """What a run arrived at.

    Attributes:
        weights: final parameters by name.
        norms: what `clip_grad_norm_` returned at each optimizer step.
        losses: of every micro-batch.
        steps: real optimizer steps.
    """

    weights: dict[str, torch.Tensor]
    norms: list[float]
    losses: list[float]
    steps: int

    def distance(self, other: Outcome) -> float:
        """Largest difference of a weight."""
        return max(float((self.weights[n].float() - w.float()).abs().max()) for n, w in other.weights.items())


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reference(case: Case) -> Outcome:
    """Plain PyTorch, one process: fp32 masters, and a copy in the case's precision that computes the gradients."""
    model = make_model(case)
    optimizer = make_optimizer(case, model)
    computing = make_model(case).to(DTYPES[case.precision])
    clipping = case.call_clipping if case.call_clipping is not None else case.config_clipping
    outcome = Outcome({}, [], [], 0)
    batches = list(global_batches(case))
    for start in range(0, len(batches), case.accumulation):
        window = batches[start : start + case.accumulation]
        for x, y in window:
            loss = loss_of(computing, x, y)
            outcome.losses.append(float(loss.detach()))
            (loss / len(window)).backward()
        for master, copy in zip(model.parameters(), computing.parameters(), strict=True):
            master.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        outcome.norms.append(float(norm))
        optimizer.step()
        with torch.no_grad():
            for master, copy in zip(model.parameters(), computing.parameters(), strict=True):
                copy.copy_(master)
        outcome.steps += 1
    outcome.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


def plugin_for(case: Case, nvme_path: str) -> Any:
    """The plugin that asks for the case."""
    from zeroaccel import DeepSpeedPlugin

    if case.config_file:
        config = {"gradient_accumulation_steps": case.accumulation, "zero_optimization": {"stage": case.stage}}
        return DeepSpeedPlugin(hf_ds_config=json.dumps(config))
    device, _, parameters = case.offload.partition("+")
    plugin = DeepSpeedPlugin(
        zero_stage=case.stage,
        gradient_accumulation_steps=case.accumulation,
        gradient_clipping=case.config_clipping,
        offload_optimizer_device=device,
        offload_param_device=device if parameters else "none",
        offload_optimizer_nvme_path=nvme_path if device == "nvme" else None,
        offload_param_nvme_path=nvme_path if device == "nvme" and parameters else None,
    )
    if case.precision == "fp16":  # a static scale, under which no step overflows, so that all 20 count
        plugin.deepspeed_config["fp16"] = {"enabled": True, "auto_cast": True, "loss_scale": 256.0}
    return plugin


def full_weights(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of a prepared model, gathered where they are partitioned."""
    import deepspeed

    parameters = dict(getattr(model, "module", model).named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}


def train(case: Case, nvme_path: str = "") -> Outcome:
    """The library, on every rank."""
    from zeroaccel import Accelerator

    accelerator = Accelerator(
        mixed_precision=case.precision,
        deepspeed_plugin=plugin_for(case, nvme_path),
        gradient_accumulation_steps=case.accumulation + 1 if case.config_file else 1,
    )
    model = make_model(case)
    model, optimizer, loader = accelerator.prepare(
        model, make_optimizer(case, model), DataLoader(make_dataset(case), batch_size=MICRO_BATCH)
    )
    outcome = Outcome({}, [], [], 0)
    for number, (x, y) in enumerate(loader, 1):
        closes = number % case.accumulation == 0 or number == len(loader)
        if case.cut == "accumulate":
            with accelerator.accumulate(model):
                _micro_batch(case, accelerator, model, optimizer, x, y, outcome, accelerator.sync_gradients)
        else:
            step = closes or case.cut == "library"
            _micro_batch(case, accelerator, model, optimizer, x, y, outcome, closes, step)
    outcome.steps = model.global_steps - model.skipped_steps
    outcome.weights = full_weights(model)
    accelerator.free_memory()
    return outcome


def _micro_batch(
    case: Case,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    outcome: Outcome,
    closes: bool,
    step: bool = True,
) -> None:
    loss = loss_of(model, x, y)
    outcome.losses.append(float(loss.detach()))
    accelerator.backward(loss)
    if case.call_clipping is not None and closes:
        outcome.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), case.call_clipping)))
    if step:
        optimizer.step()
        optimizer.zero_grad()


def train_all(cases: list[Case], nvme_path: str = "") -> list[Outcome]:
    """Several cases in one process start."""
    from tests.distributed.pool import reset_states

    outcomes = []
    for case in cases:
        reset_states()
        outcomes.append(train(case, nvme_path))
    return outcomes
