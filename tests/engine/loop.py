"""A prepared model beside its reference in plain PyTorch: what `situations.py` writes its loops with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine.contestants import LACKING, NotAvailable, make_accelerator, make_optimizer
from tests.parity.problem import DTYPES, full_weights

FEATURES, BATCH = 6, 3
WIDTH = 8
# How often the inputs are repeated under NVMe: a rank's half of the trunk's weight passes 1 MiB, below which DeepSpeed
# keeps everything in memory, and its gradient begins between two of the disk's blocks.
COPIES_ON_NVME = 11_000
# Largest difference of a weight: some roundings of float32; in 16 bit those of gradients, seen through the optimizer.
TOLERANCE = {"no": 2e-6, "bf16": 1e-3, "fp16": 2e-4}
# Of a gradient or a norm, relative to its size where that is above 1.
ROUNDING = {"no": 1e-5, "bf16": 2**-7, "fp16": 2**-10}


class Wrong(AssertionError):
    """The loop did something else than the reference.

    Attributes:
        distance: by how much a number differs, NaN where it is no number.
    """

    def __init__(self, what: str, distance: float = math.nan) -> None:
        super().__init__(what if math.isnan(distance) else f"{what} differs by {distance:.1e}")
        self.distance = distance


def demand(holds: bool, what: str) -> None:
    """Raises `Wrong` unless it holds; `what` says what is wrong then."""
    if not holds:
        raise Wrong(what)


@dataclass(frozen=True)
class Kind:
    """A way to run.

    Attributes:
        stage: ZeRO stage.
        offload: of the optimizer: "none", "cpu" or "nvme".
        precision: "no", "bf16" or "fp16".
        library: who runs the loop: "zeroaccel", "deepspeed" (its engine, natively) or "accelerate".
        nvme_path: folder for "nvme".
    """

    stage: int = 2
    offload: str = "none"
    precision: str = "no"
    library: str = "zeroaccel"
    nvme_path: str = ""

    def __str__(self) -> str:
        return "-".join([f"stage{self.stage}", self.offload, self.precision])

    @property
    def loss_scale(self) -> float:
        """Of fp16: small enough that no step overflows, large enough that no gradient is lost."""
        return 128.0 if self.precision == "fp16" else 1.0


class Net(nn.Module):
    """A trunk with two heads, a parameter of one element, and a layer that nothing uses.

    Args:
        copies: of the input side by side, with the same length as one.
        scalar: the parameter of one element has no dimensions.
    """

    def __init__(self, copies: int = 1, scalar: bool = True) -> None:
        super().__init__()
        self.copies = copies
        self.trunk = nn.Linear(FEATURES * copies, WIDTH)
        nn.init.uniform_(self.trunk.weight, -(FEATURES**-0.5), FEATURES**-0.5)
        self.scale = nn.Parameter(torch.tensor(1.5 if scalar else [1.5]))
        self.head_a = nn.Linear(WIDTH, 2)
        self.head_b = nn.Linear(WIDTH, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, head: str = "a", recompute: str = "") -> Any:
        x = x.to(self.trunk.weight.dtype).repeat(1, self.copies) / self.copies**0.5
        if recompute == "reentrant":
            return again(self.head_a, again(self.hidden, x))
        if recompute == "one layer twice":
            return self.head_a(again(self.hidden, x) + again(self.hidden, -2 * x))
        hidden = checkpoint(self.hidden, x, use_reentrant=False) if recompute else self.hidden(x)
        if head == "both":
            return self.head_a(hidden), self.head_b(hidden)
        return self.head_a(hidden) if head == "a" else self.head_b(hidden)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.trunk(x)) * self.scale


def again(part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Computes a part of a model again in a backward pass of its own, within the model's."""
    computed: torch.Tensor = checkpoint(part, x.requires_grad_(), use_reentrant=True)
    return computed


def make_model(kind: Kind, seed: int = 3, scalar: bool = False) -> Net:
    """The same weights at every call.

    Args:
        kind: how it will run. Other contestants get a parameter without dimensions only where `scalar` says so, since
            DeepSpeed fails on it before the loop begins.
        seed: of the weights.
        scalar: see `Net`.
    """
    torch.manual_seed(seed)
    return Net(COPIES_ON_NVME if kind.offload == "nvme" else 1, scalar or kind.library == "zeroaccel")


def batch_of(number: int, rank: int, device: Any = None) -> torch.Tensor:
    batch = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(100 * number + rank))
    return batch.to(device)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output.float() - 1.0).square().mean()


class Peer:
    """The reference: plain PyTorch in one process, on the mean of all ranks' losses.

    Attributes:
        model: in the case's precision; computes the gradients.
        masters: fp32 weights, which `optimizer` steps; they begin at the model's, as DeepSpeed's do. A parameter
            without a gradient counts as gradient zero, as it does under ZeRO.
        norm: of the last step's gradients, before clipping.
    """

    def __init__(self, kind: Kind, model: Net, ranks: int, device: Any, rule: str) -> None:
        self.model = model.to(device, DTYPES[kind.precision])
        self.masters = self.model if kind.precision == "no" else copy.deepcopy(self.model).float()
        self.optimizer = make_optimizer(self.masters, rule)
        self.norm = 0.0
        self._ranks = ranks
        self._device = device
        self._loss_scale = kind.loss_scale

    def batch(self, number: int, rank: int) -> torch.Tensor:
        return batch_of(number, rank, self._device)

    def loss(self, number: int, head: str = "a") -> torch.Tensor:
        """Mean over the ranks."""
        losses = [loss_of(self.model(self.batch(number, rank), head)) for rank in range(self._ranks)]
        return torch.stack(losses).mean()

    def backward(self, loss: torch.Tensor, *others: Peer) -> None:
        """Adds the gradients of a loss that may have run through other peers, too."""
        (loss * self._loss_scale).backward()
        for peer in (self, *others):
            peer._hand_over_gradients()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        if self.model is not self.masters:
            yield from zip(self.masters.parameters(), self.model.parameters(), strict=True)

    def _hand_over_gradients(self) -> None:
        for master, weight in self._pairs():
            if weight.grad is not None:
                gradient = weight.grad.float() / self._loss_scale
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in self.masters.named_parameters()
        }

    def edit(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every gradient that there is."""
        for master in self.masters.parameters():
            if master.grad is not None:
                master.grad = change(master.grad)

    def clip(self, max_norm: float) -> None:
        gradients = [master.grad.double() for master in self.masters.parameters() if master.grad is not None]
        self.norm = float(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grad_norm_(self.masters.parameters(), max_norm)

    def step(self, *losses: torch.Tensor, clip: float = float("inf")) -> None:
        """One step on the sum of the losses and of what was backwarded before."""
        if losses:
            self.backward(torch.stack(losses).sum())
        for master in self.masters.parameters():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self.clip(clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, weight in self._pairs():
                weight.copy_(master)

    def distance(self, weights: dict[str, torch.Tensor]) -> tuple[float, str]:
        """The largest difference of a weight, and whose it is."""
        return max(
            (float((weights[name].to(master.device) - master.detach()).abs().max()), name)
            for name, master in self.masters.named_parameters()
        )


class Loop:
    """A prepared model, and the reference that shall arrive at the same weights.

    Args:
        kind: how to run.
        steps: gradient accumulation steps.
        shared: another loop whose `accelerator` prepares this model, too.
        seed: of the weights.
        config: further keys of the DeepSpeed config.
        rule: the optimizer, a name in `torch.optim`.
        scalar: a parameter has no dimensions, whoever runs the loop.
        needs: words of the vocabulary that not every contestant has, see `contestants.py`.

    Attributes:
        accelerator, model, optimizer: the contestant's.
        peer: the reference.
    """

    def __init__(
        self,
        kind: Kind,
        steps: int = 1,
        shared: Loop | None = None,
        seed: int = 3,
        config: dict[str, Any] | None = None,
        rule: str = "AdamW",
        scalar: bool = False,
        needs: tuple[str, ...] = (),
    ) -> None:
        if lacking := LACKING[kind.library].intersection(needs):
            raise NotAvailable(", ".join(sorted(lacking)))
        self.kind = kind
        self.accelerator = shared.accelerator if shared else make_accelerator(kind, steps, BATCH, config or {})
        self.ranks = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        model = make_model(kind, seed, scalar)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, rule, kind))
        self.peer = Peer(kind, make_model(kind, seed, scalar), self.ranks, self.device, rule)

    def batch(self, number: int) -> torch.Tensor:
        """This rank's batch."""
        return batch_of(number, self.rank, self.device)

    def loss(self, number: int, head: str = "a") -> torch.Tensor:
        return loss_of(self.model(self.batch(number), head))

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        self.accelerator.backward(loss, **options)

    def step(self) -> None:
        self.optimizer.step()
        if self.kind.library != "deepspeed":  # whose step clears the gradients
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, Any]:
        """The model's parameters by name."""
        return dict(self.model.module.named_parameters())

    @property
    def _scale(self) -> float:
        # At stage 0 DeepSpeed's functions hand out `parameter.grad`, which holds the gradient of the scaled loss.
        return self.kind.loss_scale if self.kind.stage == 0 else 1.0

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients, before the step; unused parameters may have none at stage 0."""
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(parameter) for name, parameter in self.parameters().items()}
        return {name: value.float() / self._scale for name, value in found.items() if value is not None}

    def edit(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every gradient, before the step."""
        from deepspeed.utils import safe_set_full_grad

        for name, gradient in self.gradients().items():
            safe_set_full_grad(self.parameters()[name], change(gradient) * self._scale)

    def check_gradients(self) -> None:
        """Gradients are those of the reference now."""
        expected = self.peer.gradients()
        for name, gradient in self.gradients().items():
            size = max(float(expected[name].abs().max()), 1.0)
            distance = float((gradient.to(self.device) - expected[name]).abs().max()) / size
            if not distance <= ROUNDING[self.kind.precision]:
                raise Wrong(f"gradient of {name}", distance)

    def check_norm(self, norm: Any) -> None:
        """The norm is that of the reference's last step."""
        distance = abs(float(norm) - self.peer.norm) / max(self.peer.norm, 1.0)
        if not distance <= ROUNDING[self.kind.precision]:
            raise Wrong("norm", distance)

    def masters(self) -> dict[str, torch.Tensor]:
        """The fp32 weights."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self.kind.precision == "no":
            return full_weights(self.model)
        if self.kind.stage == 0:
            wrapper = self.model.optimizer
            weights, masters = (chain.from_iterable(groups) for groups in (wrapper.fp16_groups, wrapper.fp32_groups))
            master_of = {id(weight): master for weight, master in zip(weights, masters, strict=True)}
            return {name: master_of[id(parameter)].detach() for name, parameter in self.parameters().items()}
        return {name: safe_get_full_fp32_param(parameter) for name, parameter in self.parameters().items()}

    def check(self) -> float:
        """The largest difference of a weight, which must be one of rounding."""
        masters = self.masters()
        distance, name = self.peer.distance(masters)
        if not distance <= TOLERANCE[self.kind.precision]:
            raise Wrong(name, distance)
        for name, weight in full_weights(self.model).items():
            rounded = masters[name].cpu().to(DTYPES[self.kind.precision]).float()
            demand(torch.equal(weight, rounded), f"{name} is not its master's rounding")
        return distance
